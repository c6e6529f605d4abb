"""The queue and what it grants: never more than the budget, gangs whole or not at all, and nobody waits for ever."""

from __future__ import annotations

from collections import Counter

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from gemini.errors import ServiceError
from gemini.service.fairness import Amount
from gemini.service.lease_queue import MAX_OVERTAKEN, LeaseQueue
from gemini.service.ledger import NodeLedger
from gemini.service.member import JobKey, Member
from gemini.service.shared_holds import SharedHolds


def member(name: str, rank: int = 0, user: int = 1) -> Member:
    return Member(JobKey(user, name), rank)


def queue_on(budget: Amount) -> tuple[LeaseQueue, NodeLedger]:
    ledger = NodeLedger(budget, SharedHolds())
    return LeaseQueue(ledger), ledger


def ask(queue: LeaseQueue, name: str, host: int, **options: int) -> int:
    who = member(name, options.pop("rank", 0), options.pop("user", 1))
    return queue.ask(who, Amount(host, options.pop("disk", 0)), **options)


def test_what_fits_is_granted_and_what_does_not_waits_for_an_end():
    queue, ledger = queue_on(Amount(100, 50))
    first, second = ask(queue, "a", 60, disk=50), ask(queue, "b", 60)
    assert queue.decide().granted == [first]
    assert ledger.free() == Amount(40, 0)
    assert queue.reason(second) == "60 B of host memory, of which 40 B are free"
    ledger.end(first)
    assert queue.decide().granted == [second]


def test_more_than_the_node_has_is_refused_with_the_numbers():
    queue, _ = queue_on(Amount(100, 50))
    number = ask(queue, "a", 10, disk=51)
    kind, text = queue.decide().refused[number]
    assert kind == "never-fits"
    assert "10 B of host memory and 51 B of disk can never be granted: the whole node has 100 B of host" in text
    assert queue.waiting() == {}


def test_a_gang_is_granted_when_all_its_ranks_fit():
    queue, ledger = queue_on(Amount(100))
    held = ask(queue, "a", 30)
    queue.decide()
    ranks = [ask(queue, "gang", 40, rank=rank, num_ranks=2) for rank in (0, 1)]
    assert queue.decide().granted == []
    ledger.end(held)
    assert queue.decide().granted == ranks


def test_an_incomplete_gang_blocks_nobody_and_says_whom_it_waits_for():
    queue, _ = queue_on(Amount(100))
    number = ask(queue, "gang", 40, rank=1, num_ranks=4)
    other = ask(queue, "a", 100)
    assert queue.decide().granted == [other]
    assert queue.reason(number) == "the other ranks of its job, which have not asked yet: 0, 2, 3 of 4"


def test_all_ranks_of_a_gang_that_can_never_fit_are_refused():
    queue, _ = queue_on(Amount(100))
    numbers = [ask(queue, "gang", 60, rank=rank, num_ranks=2) for rank in (0, 1)]
    assert set(queue.decide().refused) == set(numbers)


def test_priority_comes_before_shares_and_shares_before_arrival():
    queue, ledger = queue_on(Amount(100))
    whole, small = ask(queue, "a", 80, user=1), ask(queue, "b", 20, user=1)
    queue.decide()
    of_the_same_user = ask(queue, "c", 50, user=1)
    of_another_user = ask(queue, "d", 50, user=2)
    urgent = ask(queue, "e", 50, user=1, priority=1)
    ledger.end(whole)
    assert queue.decide().granted == [urgent]
    ledger.end(small)
    assert queue.decide().granted == [of_another_user]
    ledger.end(urgent)
    assert queue.decide().granted == [of_the_same_user]


def test_a_rank_that_holds_something_is_answered_at_once():
    queue, _ = queue_on(Amount(100))
    ask(queue, "a", 60)
    queue.decide()
    more, too_much = ask(queue, "a", 30), ask(queue, "a", 20)
    decisions = queue.decide()
    assert decisions.granted == [more]
    assert decisions.refused[too_much][0] == "full"
    assert (
        "20 B of host memory and 0 B of disk more for a rank that already holds memory"
        in decisions.refused[too_much][1]
    )


def test_a_rank_waits_for_one_lease_at_a_time():
    queue, _ = queue_on(Amount(100))
    ask(queue, "a", 60, num_ranks=2)
    with pytest.raises(ServiceError, match="rank 0 of job a waits for a lease already"):
        ask(queue, "a", 60, num_ranks=2)


@pytest.mark.parametrize("stream_priority", [0, -1])
def test_a_stream_of_small_requests_delays_a_big_one_by_a_bounded_number(stream_priority):
    queue, ledger = queue_on(Amount(100))
    running = [ask(queue, f"s{number}", 10, priority=stream_priority) for number in range(10)]
    queue.decide()
    big = ask(queue, "big", 100)
    for later in range(3 * MAX_OVERTAKEN):
        ask(queue, f"later{later}", 10, priority=stream_priority)
        if not running:
            break
        ledger.end(running.pop(0))
        running += [number for number in queue.decide().granted if number != big]
    assert ledger.lease(big) is not None
    assert sum(number > big for number in running) == 0
    assert ledger.held() == Amount(100)


def test_what_is_shared_is_counted_once_and_costs_the_second_job_nothing():
    queue, ledger = queue_on(Amount(100))
    numbers = [queue.ask(member(name), Amount(15), shared={"w": 70}) for name in "ab"]
    assert queue.decide().granted == numbers
    assert ledger.shared.nbytes() == 70
    assert ledger.free() == Amount()


def test_ranks_of_a_gang_pay_for_what_they_share_once():
    queue, _ = queue_on(Amount(100))
    for rank in (0, 1):
        queue.ask(member("gang", rank), Amount(15), shared={"w": 70}, num_ranks=2)
    assert len(queue.decide().granted) == 2


def test_users_do_not_share():
    queue, _ = queue_on(Amount(100))
    queue.hold_shared(member("a", user=1), "w", 60)
    assert queue.hold_shared(member("a", user=2), "w", 60) is None


def test_the_longest_unused_warm_chunks_make_room_and_the_wanted_one_stays():
    queue, ledger = queue_on(Amount(100))
    for now_s, key in enumerate(("old", "wanted", "young")):
        queue.hold_shared(member("a"), key, 30)
        ledger.shared.release(member("a"), key, now_s=now_s)
    queue.ask(member("b"), Amount(30), shared={"wanted": 30})
    decisions = queue.decide()
    assert decisions.dropped == [(1, "old")]
    assert set(ledger.shared.holds) == {(1, "wanted"), (1, "young")}


def test_what_is_kept_of_a_rank_uses_its_filled_chunks_until_it_is_taken_or_dropped():
    (queue, ledger), who = queue_on(Amount(100)), member("a")
    lease = ledger.adopt(who, Amount(5))
    for key, nbytes in (("filled", 60), ("begun", 30)):
        queue.hold_shared(who, key, nbytes)
    ledger.shared.fill(1, "filled", "sha256:0")
    ledger.keep(lease)
    for key in ("filled", "begun"):
        ledger.shared.release(who, key, now_s=1)
    assert ledger.shared.kept_nbytes(who) == 60
    assert ledger.shared.unused() == [(1, "begun")]
    assert ledger.free() == Amount(35)
    ledger.take_kept(who, lease)
    assert queue.hold_shared(who, "filled", 60) == []
    ledger.shared.release_kept(who, now_s=2)
    assert ledger.free() == Amount(35)
    ledger.shared.release(who, "filled", now_s=3)
    assert ledger.free() == Amount(95)


def test_a_new_process_waits_though_something_is_kept_of_its_rank():
    queue, ledger = queue_on(Amount(100))
    ledger.keep(ledger.adopt(member("a"), Amount(60)))
    number = ask(queue, "a", 50)
    assert queue.decide().refused == {}
    assert queue.reason(number) == "50 B of host memory, of which 40 B are free"


def test_a_budget_that_adopted_leases_exceed_grants_nothing_until_it_holds():
    queue, ledger = queue_on(Amount(50))
    adopted = ledger.adopt(member("old"), Amount(80))
    waiting = ask(queue, "new", 10)
    assert queue.decide().granted == []
    assert ledger.free() == Amount(-30)
    ledger.end(adopted)
    assert queue.decide().granted == [waiting]


def test_the_fair_share_leaves_others_what_they_hold_or_wait_for():
    queue, _ = queue_on(Amount(90))
    ask(queue, "a", 60)
    queue.decide()
    ask(queue, "b", 40)
    queue.decide()
    assert queue.fair_host_nbytes(JobKey(1, "c")) == 30
    assert queue.fair_host_nbytes(JobKey(1, "a")) == 50


class LedgerMachine(RuleBasedStateMachine):
    """Jobs of one to three ranks come, wait, hold, share and go in any order."""

    BUDGET = Amount(100, 40)

    def __init__(self) -> None:
        super().__init__()
        self.num_ranks = {"a": 1, "b": 2, "c": 3, "d": 1, "e": 1}
        self.queue, self.ledger = queue_on(self.BUDGET)
        self.leases: set[int] = set()
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
            if who not in self.queue.waiting().values():
                amount = Amount(host // self.num_ranks[name], disk // self.num_ranks[name])
                self.queue.ask(who, amount, num_ranks=self.num_ranks[name], priority=priority, shared=shared)

    @rule(pick=st.integers(0, 100))
    def end_one(self, pick):
        leases = sorted(self.leases)
        if leases:
            number = leases[pick % len(leases)]
            who, _ = self.ledger.lease(number)
            self.ledger.end(number)
            self.leases.remove(number)
            for _, key in list(self.ledger.shared.holds):
                self.ledger.shared.release(who, key, now_s=self.now_s)

    @rule(pick=st.integers(0, 100))
    def withdraw_one(self, pick):
        waiting = sorted(self.queue.waiting())
        if waiting:
            self.queue.withdraw(waiting[pick % len(waiting)])

    @precondition(lambda self: self.ledger.shared.unused())
    @rule()
    def expire_one(self):
        self.ledger.shared.drop(*self.ledger.shared.unused()[0])

    @rule()
    def decide(self):
        self.now_s += 1
        decisions = self.queue.decide()
        assert not set(decisions.granted) & set(self.queue.waiting())
        assert all(self.ledger.lease(number) for number in decisions.granted)
        assert self.queue.decide().granted == []
        self.leases.update(decisions.granted)

    @invariant()
    def the_budget_holds(self):
        held = self.ledger.held() + Amount(host=self.ledger.shared.nbytes())
        assert held.fits_in(self.BUDGET)

    @invariant()
    def gangs_are_whole(self):
        for gang in self.queue._gangs.values():
            assert gang.num_overtaken <= MAX_OVERTAKEN or not gang.is_complete

    def teardown(self):
        """When everybody who holds something ends, everybody whose job has asked is granted."""
        for _ in range(200):
            self.decide()
            for number in self.leases:
                self.ledger.end(number)
            self.leases.clear()
            for (_, key), hold in list(self.ledger.shared.holds.items()):
                for who in list(hold.holders):
                    self.ledger.shared.release(who, key, now_s=self.now_s)
        num_waiting = Counter(who.job for who in self.queue.waiting().values())
        assert not [job for job, count in num_waiting.items() if count == self.num_ranks[job.name]]


TestLedgerMachine = LedgerMachine.TestCase
TestLedgerMachine.settings = settings(max_examples=60, stateful_step_count=40)
