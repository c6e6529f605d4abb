"""The ledger: never more than the budget, gangs whole or not at all, and nobody waits for ever."""

from __future__ import annotations

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from gemini.errors import ServiceError
from gemini.service.fairness import Amount
from gemini.service.node_ledger import MAX_OVERTAKEN, JobKey, Member, NodeLedger


def member(name: str, rank: int = 0, user: int = 1) -> Member:
    return Member(JobKey(user, name), rank)


def ask(ledger: NodeLedger, name: str, host: int, **options: int) -> int:
    who = member(name, options.pop("rank", 0), options.pop("user", 1))
    return ledger.ask(who, Amount(host, options.pop("disk", 0)), **options)


def test_what_fits_is_granted_and_what_does_not_waits_for_an_end():
    ledger = NodeLedger(Amount(100, 50))
    first, second = ask(ledger, "a", 60, disk=50), ask(ledger, "b", 60)
    assert ledger.settle().granted == [first]
    assert ledger.free() == Amount(40, 0)
    assert ledger.reason(second) == "60 B of host memory, of which 40 B are free"
    ledger.end(first)
    assert ledger.settle().granted == [second]


def test_more_than_the_node_has_is_refused_with_the_numbers():
    ledger = NodeLedger(Amount(100, 50))
    number = ask(ledger, "a", 10, disk=51)
    kind, text = ledger.settle().refused[number]
    assert kind == "never-fits"
    assert "10 B of host memory and 51 B of disk can never be granted: the whole node has 100 B of host" in text
    assert ledger.waiting() == {}


def test_a_gang_is_granted_when_all_its_ranks_fit():
    ledger = NodeLedger(Amount(100))
    held = ask(ledger, "a", 30)
    ledger.settle()
    ranks = [ask(ledger, "gang", 40, rank=rank, num_ranks=2) for rank in (0, 1)]
    assert ledger.settle().granted == []
    ledger.end(held)
    assert ledger.settle().granted == ranks


def test_an_incomplete_gang_blocks_nobody_and_says_whom_it_waits_for():
    ledger = NodeLedger(Amount(100))
    number = ask(ledger, "gang", 40, rank=1, num_ranks=4)
    other = ask(ledger, "a", 100)
    assert ledger.settle().granted == [other]
    assert ledger.reason(number) == "its job's other ranks, which have not asked yet: 0, 2, 3 of 4"


def test_all_ranks_of_a_gang_that_can_never_fit_are_refused():
    ledger = NodeLedger(Amount(100))
    numbers = [ask(ledger, "gang", 60, rank=rank, num_ranks=2) for rank in (0, 1)]
    assert set(ledger.settle().refused) == set(numbers)


def test_priority_comes_before_shares_and_shares_before_arrival():
    ledger = NodeLedger(Amount(100))
    whole, small = ask(ledger, "a", 80, user=1), ask(ledger, "b", 20, user=1)
    ledger.settle()
    of_the_same_user = ask(ledger, "c", 50, user=1)
    of_another_user = ask(ledger, "d", 50, user=2)
    urgent = ask(ledger, "e", 50, user=1, priority=1)
    ledger.end(whole)
    assert ledger.settle().granted == [urgent]
    ledger.end(small)
    assert ledger.settle().granted == [of_another_user]
    ledger.end(urgent)
    assert ledger.settle().granted == [of_the_same_user]


def test_a_rank_that_holds_something_is_answered_at_once():
    ledger = NodeLedger(Amount(100))
    ask(ledger, "a", 60)
    ledger.settle()
    more, too_much = ask(ledger, "a", 30), ask(ledger, "a", 20)
    settled = ledger.settle()
    assert settled.granted == [more]
    assert settled.refused[too_much][0] == "full"
    assert "20 B of host memory and 0 B of disk more for a rank that holds something" in settled.refused[too_much][1]


def test_a_rank_waits_for_one_lease_at_a_time():
    ledger = NodeLedger(Amount(100))
    ask(ledger, "a", 60, num_ranks=2)
    with pytest.raises(ServiceError, match="rank 0 of job a waits for a lease already"):
        ask(ledger, "a", 60, num_ranks=2)


@pytest.mark.parametrize("stream_priority", [0, -1])
def test_a_stream_of_small_requests_delays_a_big_one_by_a_bounded_number(stream_priority):
    ledger = NodeLedger(Amount(100))
    running = [ask(ledger, f"s{number}", 10, priority=stream_priority) for number in range(10)]
    ledger.settle()
    big = ask(ledger, "big", 100)
    for later in range(3 * MAX_OVERTAKEN):
        ask(ledger, f"later{later}", 10, priority=stream_priority)
        if not running:
            break
        ledger.end(running.pop(0))
        running += [number for number in ledger.settle().granted if number != big]
    assert ledger.lease(big) is not None
    assert sum(number > big for number in running) == 0
    assert ledger.held() == Amount(100)


def test_what_is_shared_is_counted_once_and_costs_the_second_job_nothing():
    ledger = NodeLedger(Amount(100))
    numbers = [ledger.ask(member(name), Amount(15), shared={"w": 70}) for name in "ab"]
    assert ledger.settle().granted == numbers
    assert ledger.shared_nbytes() == 70
    assert ledger.free() == Amount()


def test_ranks_of_a_gang_pay_for_what_they_share_once():
    ledger = NodeLedger(Amount(100))
    for rank in (0, 1):
        ledger.ask(member("gang", rank), Amount(15), shared={"w": 70}, num_ranks=2)
    assert len(ledger.settle().granted) == 2


def test_users_do_not_share():
    ledger = NodeLedger(Amount(100))
    ledger.hold_shared(member("a", user=1), "w", 60)
    assert ledger.hold_shared(member("a", user=2), "w", 60) is None


def test_the_longest_unused_warm_chunks_make_room_and_the_wanted_one_stays():
    ledger = NodeLedger(Amount(100))
    for now_s, key in enumerate(("old", "wanted", "young")):
        ledger.hold_shared(member("a"), key, 30)
        ledger.release_shared(member("a"), key, now_s=now_s)
    ledger.ask(member("b"), Amount(30), shared={"wanted": 30})
    settled = ledger.settle()
    assert settled.dropped == [(1, "old")]
    assert set(ledger.shared) == {(1, "wanted"), (1, "young")}


def test_what_is_kept_of_a_rank_uses_its_filled_chunks_until_it_is_taken_or_dropped():
    ledger, who = NodeLedger(Amount(100)), member("a")
    lease = ledger.adopt(who, Amount(5))
    for key, nbytes in (("filled", 60), ("begun", 30)):
        ledger.hold_shared(who, key, nbytes)
    ledger.fill_shared(1, "filled", "sha256:0")
    ledger.keep(lease)
    for key in ("filled", "begun"):
        ledger.release_shared(who, key, now_s=1)
    assert ledger.kept_shared_nbytes(who) == 60
    assert ledger.unused() == [(1, "begun")]
    assert ledger.free() == Amount(35)
    ledger.take_kept(who, lease)
    assert ledger.hold_shared(who, "filled", 60) == []
    ledger.release_kept_shared(who, now_s=2)
    assert ledger.free() == Amount(35)
    ledger.release_shared(who, "filled", now_s=3)
    assert ledger.free() == Amount(95)


def test_a_new_process_waits_though_something_is_kept_of_its_rank():
    ledger = NodeLedger(Amount(100))
    ledger.keep(ledger.adopt(member("a"), Amount(60)))
    number = ask(ledger, "a", 50)
    assert ledger.settle().refused == {}
    assert ledger.reason(number) == "50 B of host memory, of which 40 B are free"


def test_a_budget_that_adopted_leases_exceed_grants_nothing_until_it_holds():
    ledger = NodeLedger(Amount(50))
    adopted = ledger.adopt(member("old"), Amount(80))
    waiting = ask(ledger, "new", 10)
    assert ledger.settle().granted == []
    assert ledger.free() == Amount(-30)
    ledger.end(adopted)
    assert ledger.settle().granted == [waiting]


def test_the_fair_share_leaves_others_what_they_hold_or_wait_for():
    ledger = NodeLedger(Amount(90))
    ask(ledger, "a", 60)
    ledger.settle()
    ask(ledger, "b", 40)
    ledger.settle()
    assert ledger.fair_host_nbytes(JobKey(1, "c")) == 30
    assert ledger.fair_host_nbytes(JobKey(1, "a")) == 50


class LedgerMachine(RuleBasedStateMachine):
    """Jobs of one to three ranks come, wait, hold, share and go in any order."""

    BUDGET = Amount(100, 40)

    def __init__(self) -> None:
        super().__init__()
        self.num_ranks = {"a": 1, "b": 2, "c": 3, "d": 1, "e": 1}
        self.ledger = NodeLedger(self.BUDGET)
        self.now_s = 0.0

    names = st.sampled_from("abcde")

    @rule(
        name=names,
        user=st.integers(1, 2),
        host=st.integers(0, 60),
        disk=st.integers(0, 30),
        priority=st.integers(-1, 1),
        shared=st.dictionaries(st.sampled_from("xy"), st.just(25), max_size=2),
    )
    def ask_for_all_ranks(self, name, user, host, disk, priority, shared):
        for rank in range(self.num_ranks[name]):
            who = Member(JobKey(user, name), rank)
            if who not in self.ledger.waiting().values():
                amount = Amount(host // self.num_ranks[name], disk // self.num_ranks[name])
                self.ledger.ask(who, amount, num_ranks=self.num_ranks[name], priority=priority, shared=shared)

    @rule(pick=st.integers(0, 100))
    def end_one(self, pick):
        leases = sorted(self.ledger._leases)
        if leases:
            number = leases[pick % len(leases)]
            who, _ = self.ledger.lease(number)
            self.ledger.end(number)
            for _, key in list(self.ledger.shared):
                self.ledger.release_shared(who, key, now_s=self.now_s)

    @rule(pick=st.integers(0, 100))
    def withdraw_one(self, pick):
        waiting = sorted(self.ledger.waiting())
        if waiting:
            self.ledger.withdraw(waiting[pick % len(waiting)])

    @precondition(lambda self: self.ledger.unused())
    @rule()
    def expire_one(self):
        self.ledger.drop_shared(*self.ledger.unused()[0])

    @rule()
    def settle(self):
        self.now_s += 1
        settled = self.ledger.settle()
        assert not set(settled.granted) & set(self.ledger.waiting())
        assert all(self.ledger.lease(number) for number in settled.granted)
        assert self.ledger.settle().granted == []

    @invariant()
    def the_budget_holds(self):
        held = self.ledger.held() + Amount(host=self.ledger.shared_nbytes())
        assert held.fits_in(self.BUDGET)

    @invariant()
    def gangs_are_whole(self):
        for gang in self.ledger._gangs.values():
            assert gang.num_overtaken <= MAX_OVERTAKEN or not gang.is_complete

    def teardown(self):
        """When everybody who holds something ends, everybody whose job has asked is granted."""
        for _ in range(200):
            self.settle()
            for number in list(self.ledger._leases):
                self.ledger.end(number)
            for (_, key), hold in list(self.ledger.shared.items()):
                for who in list(hold.holders):
                    self.ledger.release_shared(who, key, now_s=self.now_s)
        assert not [gang for gang in self.ledger._gangs.values() if gang.is_complete]


TestLedgerMachine = LedgerMachine.TestCase
TestLedgerMachine.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)
