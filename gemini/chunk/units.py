"""Which modules become units: rules over the module tree, nothing about bytes moved or tensors.

[Note: Unit rules]
A unit is hooked, so it must be a module that can be called. That other code may use its parameters without calling it
is no concern of the rules: the hooks see such uses, but for those in compiled code. In order:

1. *Blocks named by the model*: outermost modules whose class is in `_no_split_modules`.
2. *Repeated blocks*: children of a ModuleList, ModuleDict or Sequential with two or more children that hold parameters.
   A leaf that is negligible beside its largest sibling (the norms between convolutions) is none, and neither is a
   small container no larger than one unit elsewhere (a classification head beside the blocks).
3. *The rest*, where larger than `max_small_nbytes`: whole, if no larger than the largest unit or indivisible module so
   far or if cutting would leave a piece of more than half of it; else cut, its own direct parameters going to the root.

A block that is itself a row of blocks (a stage of a pyramid, an encoder in a row of towers) is cut into those, see
`_is_stage`; a decoder layer that holds a row of experts is not.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from functools import cached_property

from gemini.model.module_tree import ModuleNode, ModuleTree

__all__ = ["choose_units", "reachable_param_names", "root_param_names"]

_NEGLIGIBLE_FRACTION = 16
"""A leaf smaller than its largest sibling by this factor does not become a repeated unit."""
_PYRAMID_FRACTION = 2
"""Siblings of one class that differ by this factor in size are stages rather than blocks."""
_PLAIN_CONTAINER_NAMES = frozenset({"ModuleDict", "ModuleList", "Sequential"})


def choose_units(tree: ModuleTree, *, max_small_nbytes: int) -> tuple[str, ...]:
    """Choose the modules that become units, see [Note: Unit rules].

    Args:
        tree: the model.
        max_small_nbytes: modules outside any block up to this size are left to the root unit.

    Returns:
        Fully qualified names in module order, the root not included.
    """
    chooser = _UnitChooser(tree, max_small_nbytes)
    chooser.choose_blocks()
    chooser.choose_rest()
    return tuple(node.name for node in tree.nodes if node.name in chooser.units)


def reachable_param_names(tree: ModuleTree, module_name: str) -> tuple[str, ...]:
    """Return the parameters of a module and of all modules below it, in parameter order."""
    return _collect_param_names(tree, module_name, frozenset())


def root_param_names(tree: ModuleTree, unit_names: tuple[str, ...]) -> tuple[str, ...]:
    """Return the parameters that some module outside all units holds, in parameter order."""
    return _collect_param_names(tree, "", frozenset(unit_names))


def _collect_param_names(tree: ModuleTree, start: str, closed: frozenset[str]) -> tuple[str, ...]:
    found: set[str] = set()
    seen: set[str] = set()
    stack = [start]
    while stack:
        name = stack.pop()
        if name not in seen and name not in closed:
            seen.add(name)
            node = tree.node_by_name[name]
            found.update(node.param_names)
            stack.extend(node.child_names)
    return tuple(sorted(found, key=lambda name: tree.spec_by_name[name].index))


class _UnitChooser:
    """The state of one choice: the units so far and what is known of every module."""

    def __init__(self, tree: ModuleTree, max_small_nbytes: int) -> None:
        self.units: set[str] = set()
        self._tree = tree
        self._max_small_nbytes = max_small_nbytes
        self._seen: set[str] = set()
        self._params: dict[str, frozenset[str]] = {}
        self._sizes: dict[str, int] = {}

    # -- rules 1 and 2

    def choose_blocks(self) -> None:
        """Choose the named and the repeated blocks."""
        rows: list[tuple[str, list[str]]] = []
        self._visit_block(self._tree.nodes[0], rows)
        for container_name, row in rows:
            container = self._tree.node_by_name[container_name]
            elsewhere = max((self._nbytes_of(name) for name in self.units.difference(row)), default=0)
            if self._nbytes(container) <= min(self._max_small_nbytes, elsewhere):
                self.units.difference_update(row)

    def _visit_block(self, node: ModuleNode, rows: list[tuple[str, list[str]]]) -> None:
        if node.name in self._seen:
            return
        self._seen.add(node.name)
        if self._is_named_block(node) and node.name not in self._named_stages and self._can_be_unit(node):
            self.units.add(node.name)
            return
        children = [] if node.is_atomic else self._bearing_children(node)
        row: list[str] = []
        for child in children:
            if node.is_container and len(children) > 1 and self._is_repeated_block(child, children):
                self._seen.add(child.name)
                self.units.add(child.name)
                row.append(child.name)
            else:
                self._visit_block(child, rows)
        rows.extend([(node.name, row)] if row else [])

    def _is_repeated_block(self, child: ModuleNode, siblings: list[ModuleNode]) -> bool:
        if child.name in self._seen or not self._can_be_unit(child) or self._holds_named_block(child):
            return False
        nbytes = self._nbytes(child)
        is_leaf = not self._bearing_children(child)
        largest = max(self._nbytes(sibling) for sibling in siblings)
        if is_leaf and nbytes <= self._max_small_nbytes and nbytes * _NEGLIGIBLE_FRACTION <= largest:
            return False
        return not self._is_stage([node for node in siblings if node.class_name == child.class_name], child)

    def _is_stage(self, group: list[ModuleNode], child: ModuleNode) -> bool:
        """Return whether a module in a row is itself a row of blocks; group: siblings of its class, itself included."""
        if child.is_atomic:
            return False
        if child.class_name in _PLAIN_CONTAINER_NAMES:
            return self._num_inner_blocks(child, may_be_leaves=len(group) == 1) > 0
        num_blocks = [self._num_inner_blocks(node, may_be_leaves=False) for node in group]
        if min(num_blocks) == 0 or max(num_blocks) < 2:
            return False
        return len(group) == 1 or self._is_pyramid(group) or self._are_towers(group, min(num_blocks))

    def _is_pyramid(self, group: list[ModuleNode]) -> bool:
        sizes = [self._nbytes(node) for node in group]
        return max(sizes) >= _PYRAMID_FRACTION * min(sizes)

    def _are_towers(self, group: list[ModuleNode], num_blocks: int) -> bool:
        """Few modules, each with more blocks than there are modules, the blocks made of modules themselves."""
        blocks = [block for node in group for row in self._inner_rows(node) for block in row]
        return num_blocks > len(group) and all(self._is_deep(block) for block in blocks)

    def _num_inner_blocks(self, node: ModuleNode, *, may_be_leaves: bool) -> int:
        """Count the like modules that lie in rows inside a module; 0 where they are not most of it."""
        rows = [row for row in self._inner_rows(node) if may_be_leaves or self._bearing_children(row[0])]
        held = frozenset[str]().union(*(self._params_below(block.name) for row in rows for block in row))
        if 2 * self._nbytes_of_params(held) <= self._nbytes(node):
            return 0
        return sum(len(row) for row in rows)

    def _inner_rows(self, node: ModuleNode) -> Iterator[list[ModuleNode]]:
        """Yield the outermost containers at or below a module whose children are all of one class."""
        children = self._bearing_children(node)
        class_names = {child.class_name for child in children}
        is_row = node.is_container and len(class_names) == 1 and class_names.isdisjoint(_PLAIN_CONTAINER_NAMES)
        if is_row and children[0].is_called:
            yield children
            return
        for child in children:
            yield from self._inner_rows(child)

    def _is_deep(self, node: ModuleNode) -> bool:
        """Whether the module is made of modules that are themselves made of modules, containers not counted."""
        return any(
            self._is_deep(child) if child.class_name in _PLAIN_CONTAINER_NAMES else bool(self._bearing_children(child))
            for child in self._bearing_children(node)
        )

    # -- rule 3

    def choose_rest(self) -> None:
        """Choose among the modules that are in no block."""
        self._seen = set()
        largest = max((self._nbytes_of(name) for name in self.units), default=0)
        indivisible = [self._nbytes(node) for node in self._tree.nodes if self._is_indivisible(node)]
        self._visit_rest(self._tree.nodes[0], max([largest, *indivisible]))

    def _visit_rest(self, node: ModuleNode, whole_nbytes: int) -> None:
        if node.name in self._seen or node.name in self.units:
            return
        self._seen.add(node.name)
        holds_unit = self._holds_unit(node)
        if self._nbytes(node) <= self._max_small_nbytes and not holds_unit:
            return
        if self._can_be_unit(node) and not holds_unit and self._stays_whole(node, whole_nbytes):
            self.units.add(node.name)
        elif not node.is_atomic:
            for child in self._bearing_children(node):
                self._visit_rest(child, whole_nbytes)

    def _is_indivisible(self, node: ModuleNode) -> bool:
        can_be_cut = bool(self._bearing_children(node)) and not node.is_atomic and not node.is_compiled
        return self._can_be_unit(node) and not can_be_cut

    def _stays_whole(self, node: ModuleNode, whole_nbytes: int) -> bool:
        nbytes = self._nbytes(node)
        return self._is_indivisible(node) or nbytes <= whole_nbytes or 2 * max(self._pieces(node)) > nbytes

    def _pieces(self, node: ModuleNode) -> list[int]:
        """Return the bytes of what a module falls into when cut all the way."""
        own_nbytes = self._nbytes_of_params(node.param_names)
        if node.is_atomic:
            return [self._nbytes(node)]
        return [own_nbytes, *(size for child in self._bearing_children(node) for size in self._pieces(child))]

    # -- what is known of a module

    def _can_be_unit(self, node: ModuleNode) -> bool:
        return node.is_called and node.name != self._tree.nodes[0].name

    def _is_named_block(self, node: ModuleNode) -> bool:
        return node.class_name in self._tree.no_split_classes

    @cached_property
    def _named_stages(self) -> frozenset[str]:
        """Modules of the named classes that are rather rows of blocks: HF lists stages of pyramids too."""
        groups: dict[str, list[ModuleNode]] = {}
        for node in self._tree.nodes:
            if self._is_named_block(node):
                groups.setdefault(node.class_name, []).append(node)
        stages = [group for group in groups.values() if self._is_pyramid(group) and self._is_stage(group, group[0])]
        return frozenset(node.name for group in stages for node in group)

    def _holds_named_block(self, node: ModuleNode) -> bool:
        return self._any_at_or_below(node, self._is_named_block)

    def _holds_unit(self, node: ModuleNode) -> bool:
        return self._any_at_or_below(node, lambda below: below.name in self.units)

    def _any_at_or_below(self, node: ModuleNode, holds: Callable[[ModuleNode], bool]) -> bool:
        return holds(node) or any(self._any_at_or_below(child, holds) for child in self._bearing_children(node))

    def _bearing_children(self, node: ModuleNode) -> list[ModuleNode]:
        """List the children with a parameter at or below them."""
        return [self._tree.node_by_name[name] for name in node.child_names if self._params_below(name)]

    def _params_below(self, name: str) -> frozenset[str]:
        if name not in self._params:
            node = self._tree.node_by_name[name]
            self._params[name] = frozenset(node.param_names).union(*map(self._params_below, node.child_names))
        return self._params[name]

    def _nbytes(self, node: ModuleNode) -> int:
        """Return the bytes of a module's parameters, those shared with other modules included."""
        return self._nbytes_of(node.name)

    def _nbytes_of(self, name: str) -> int:
        if name not in self._sizes:
            self._sizes[name] = self._nbytes_of_params(self._params_below(name))
        return self._sizes[name]

    def _nbytes_of_params(self, names: Iterable[str]) -> int:
        specs = (self._tree.spec_by_name[name] for name in names)
        return sum(spec.numel * spec.dtype.itemsize for spec in specs)
