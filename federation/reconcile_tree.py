"""Two inventories compared at a cost proportional to their difference: a tree of sums over keyed hashes.

Each content (SOP Instance UID and digest) is hashed with the salt of this one comparison; the first bits of
the hash say in which leaf it lies, and the sum (XOR) of the hashes below a node of the tree stands for
everything there. Equal roots end the comparison with one message. Else whoever asks goes down, sixteen
children at a time, only where sums differ, and what lies in the leaves that differ is told one by one.

Nothing is kept between comparisons: one pass over an index that is read by its keys costs seconds for a
million rows, once a night, where sums that were kept would have to be right after every crash and would make
each store write once more. The salt is new each time, so nobody can choose contents whose sums cancel out.
No clock, no wire, no disk of its own.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from hashlib import blake2b

HASH_BYTES = 16
SALT_BYTES = 16
FAN_OUT = 16
DEPTH_MAX = 5        # 16 ** 5 leaves: about a million, 40 MB of sums
LEAF_ROWS = 48       # about as many are told for a leaf that differs
ASK_NODES_MAX = 256  # in one question: its answer takes 64 KiB

Content = tuple[str, bytes]


def depth_for(rows: int) -> int:
    """How deep the tree is for so many contents, the larger of the two inventories."""
    depth = 0
    while depth < DEPTH_MAX and rows > LEAF_ROWS * FAN_OUT**depth:
        depth += 1
    return depth


def hash_of(salt: bytes, content: Content) -> int:
    """The hash of a content in one comparison."""
    uid, digest = content
    return int.from_bytes(blake2b(uid.encode() + digest, digest_size=HASH_BYTES, salt=salt).digest(), "big")


class Tree:
    """The sums of one inventory. Add everything, then ask; each content is added once."""

    def __init__(self, salt: bytes, depth: int) -> None:
        if len(salt) != SALT_BYTES or not 0 <= depth <= DEPTH_MAX:
            raise ValueError("a tree has a salt of 16 bytes and a depth of 0 to 5")
        self.salt = salt
        self.depth = depth
        self.count = 0
        self._shift = HASH_BYTES * 8 - 4 * depth
        self._leaves = [0] * FAN_OUT**depth
        self._levels: list[list[int]] = []

    def add(self, contents: Iterable[Content]) -> None:
        """More of the inventory. The loop is all that a comparison of equal inventories costs."""
        leaves, shift, salt, count = self._leaves, self._shift, self.salt, self.count
        hashed, number = blake2b, int.from_bytes
        for uid, digest in contents:
            value = number(hashed(uid.encode() + digest, digest_size=HASH_BYTES, salt=salt).digest(), "big")
            leaves[value >> shift] ^= value
            count += 1
        self.count = count
        self._levels = []

    def leaf_of(self, value: int) -> int:
        """The leaf in which a hash lies."""
        return value >> self._shift

    @property
    def root(self) -> int:
        return self.sums(0, [0])[0]

    def sums(self, level: int, nodes: Sequence[int]) -> list[int]:
        """The sums of some nodes of a level; the root is the one of level 0."""
        if not self._levels:
            levels = [self._leaves]
            for _ in range(self.depth):
                below, above = levels[-1], []
                for start in range(0, len(below), FAN_OUT):
                    total = 0
                    for value in below[start : start + FAN_OUT]:
                        total ^= value
                    above.append(total)
                levels.append(above)
            self._levels = levels[::-1]
        row = self._levels[level]
        return [row[node] for node in nodes]

    def children(self, level: int, nodes: Sequence[int]) -> list[int]:
        """The sums of the children of some nodes, sixteen for each, in order."""
        below = [node * FAN_OUT + child for node in nodes for child in range(FAN_OUT)]
        return self.sums(level + 1, below)


class Descent:
    """Where two trees of one salt and depth differ, found by questions to whoever has the other. `question`
    says what to ask, `answer` takes what came, until there is none: then `leaves` are those that differ."""

    def __init__(self, own: Tree, their_root: int) -> None:
        self._own = own
        self._open: list[tuple[int, int]] = []  # level, node: known to differ, children not asked for yet
        self._asked: tuple[int, list[int]] = (0, [])
        self.leaves: list[int] = []
        if own.root != their_root:
            self._found(0, 0)

    def question(self) -> tuple[int, list[int]] | None:
        """A level and nodes of it whose children's sums are wanted."""
        if not self._open:
            return None
        level = self._open[-1][0]
        nodes: list[int] = []
        while self._open and self._open[-1][0] == level and len(nodes) < ASK_NODES_MAX:
            nodes.append(self._open.pop()[1])
        self._asked = level, nodes
        return self._asked

    def answer(self, sums: Sequence[int]) -> None:
        """The other's sums of the children that were asked for. ValueError when they are not that."""
        level, nodes = self._asked
        if len(sums) != len(nodes) * FAN_OUT:
            raise ValueError("an answer has sixteen sums for each node")
        own = self._own.children(level, nodes)
        for place, (mine, theirs) in enumerate(zip(own, sums, strict=True)):
            if mine != theirs:
                self._found(level + 1, nodes[place // FAN_OUT] * FAN_OUT + place % FAN_OUT)

    def _found(self, level: int, node: int) -> None:
        if level == self._own.depth:
            self.leaves.append(node)
        else:
            self._open.append((level, node))


def in_leaves(tree: Tree, contents: Iterable[Content], leaves: frozenset[int]) -> dict[int, Content]:
    """Those contents that lie in some leaves, by their hashes."""
    found: dict[int, Content] = {}
    for content in contents:
        value = hash_of(tree.salt, content)
        if tree.leaf_of(value) in leaves:
            found[value] = content
    return found
