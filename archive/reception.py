"""One instance on its way in: where its bytes lie while they arrive, and the last look at them before intake
decides. Decides nothing itself.

Up to 64 KiB gather as pieces; up to `small_object_bytes_max` in page-aligned memory, from which they go to
disk in one write without a further copy; what is larger, or what the shared byte budget has no room for,
streams into a pack of its own. The digest is taken as the bytes come. One that its sender has named
(`PartialKey`) may be suspended when the sender is cut off, and gone on with (`archive/partials.py`).
"""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from archive.dataset.header import scan
from archive.errors import Corrupt, DatasetMismatch, TooLarge
from archive.model import Attributes, ConflictPolicy, InstanceHead
from archive.packs.growing import Growing
from archive.packs.images import RecordImage
from archive.packs.lanes import LANE_BYTES
from archive.packs.large import OwnPack
from archive.packs.storage import Buffer

if TYPE_CHECKING:
    from archive.intake import Intake, Ticket
    from archive.partials import PartialKey

Content = bytes | RecordImage | OwnPack

_GRANT_BYTES = 64 << 10
_PIECES_BYTES_MAX = 64 << 10
_PIECES_MAX = 128
_FREE_CHECK_BYTES = 64 << 20


class Reception:
    """See the module's docstring. `commit` or `abort` ends it; after an exception from `write`, `room` or
    `filled` it is ended."""

    def __init__(
        self,
        intake: Intake,
        head: InstanceHead,
        conflict: bool,
        size_hint: int,
        policy: ConflictPolicy,
        partial: PartialKey | None = None,
        offset: int = 0,
    ) -> None:
        """`partial` says that it may be suspended, `offset` that it goes on there."""
        self._intake = intake
        self._head = head
        self._conflict = conflict
        self._policy = policy
        self._small_max = intake.limits.small_object_bytes_max
        self._pieces: list[bytes] = []
        self._image: RecordImage | None = None
        self._own: OwnPack | None = None
        self._running = hashlib.sha256()
        self._size = 0
        self._granted = 0
        self._checked = 0
        self._ended = False
        self._partial: PartialKey | None = None
        if offset and partial is not None:
            self._go_on(partial, offset)
        elif size_hint > self._small_max:
            own = self._begin_own()
            if partial is not None:
                intake.partials.forget(partial)
                intake.partials.note(partial, own.name, size_hint)
                self._partial = partial

    @property
    def size(self) -> int:
        """The bytes of the data set so far."""
        return self._size

    @property
    def ended(self) -> bool:
        return self._ended

    def read_beside(self) -> Growing | None:
        """What is on disk of it while it arrives, for a reader in another thread; None for what gathers in
        memory, and when it is over. Raises OSError."""
        own = self._own
        return None if own is None else own.read_beside()

    def write(self, view: Buffer) -> None:
        """More of the data set, without group 2, in order. Copied or on disk when this returns."""
        try:
            self._make_place(self._size + len(view))
            if self._own is not None:
                self._own.write(view)
            elif self._image is not None:
                room = self._image.room(len(view))
                room[:] = view
                self._image.filled(len(view))
                self._running.update(room)
            else:
                self._pieces.append(view if type(view) is bytes else bytes(view))
                if len(self._pieces) >= _PIECES_MAX:  # each costs more than two octets: crumbs are joined
                    self._pieces = [b"".join(self._pieces)]
        except BaseException:
            self.abort()
            raise
        self._size += len(view)

    def room(self, size: int) -> memoryview | None:
        """Where some of the next `size` bytes may be put, at least one of them; None when they are to be
        written."""
        try:
            self._make_place(self._size + size)
        except BaseException:
            self.abort()
            raise
        if self._own is not None:
            return self._own.room(size)
        return None if self._image is None else self._image.room(size)

    def filled(self, view: memoryview) -> None:
        """`view`, the beginning of the room that was given, holds the next bytes."""
        try:
            if self._own is not None:
                self._own.filled(view)
            elif self._image is not None:
                self._image.filled(len(view))
                self._running.update(view)
        except BaseException:
            self.abort()
            raise
        self._size += len(view)

    def _make_place(self, size: int) -> None:
        """For a data set that has grown to `size` bytes."""
        if self._ended:
            raise ValueError("this reception has ended")
        if size > self._intake.limits.object_bytes_max:
            raise TooLarge(f"an instance may have {self._intake.limits.object_bytes_max} bytes")
        if self._own is not None:
            if size - self._checked >= _FREE_CHECK_BYTES:
                self._intake.require_space(0)
                self._checked = size
        elif not self._may_hold(size):
            self._spill()
        elif size > _PIECES_BYTES_MAX and self._image is None:
            self._image = self._intake.packs.begin_image(self._head)
            for piece in self._pieces:
                self._image.room(len(piece))[:] = piece
                self._image.filled(len(piece))
                self._running.update(piece)
            self._pieces = []

    def _may_hold(self, size: int) -> bool:
        """Whether `size` bytes may be held in memory. Past the budget an object goes to disk instead."""
        return size <= self._small_max and self._grant(size)

    def _grant(self, size: int) -> bool:
        if size > self._granted:
            more = max(size - self._granted, _GRANT_BYTES)
            if not self._intake.budget.take(more):
                return False
            self._granted += more
        return True

    def _begin_own(self) -> OwnPack:
        self._own = self._intake.packs.begin_own(self._head, buffered=self._grant(2 * LANE_BYTES))
        return self._own

    def _go_on(self, partial: PartialKey, offset: int) -> None:
        intake = self._intake
        kept = intake.partials.take(partial, offset)
        try:
            self._own = intake.packs.reopen_own(self._head, kept, buffered=self._grant(2 * LANE_BYTES))
        except BaseException:
            intake.partials.over(kept.pack)
            self.abort()
            raise
        self._partial, self._size, self._checked = partial, offset, offset

    def _spill(self) -> None:
        pieces, image = self._pieces, self._image
        own = self._begin_own()
        for piece in pieces:
            own.write(piece)
        if image is not None:
            own.write(image.dataset)
            image.release()
        self._pieces, self._image = [], None

    def commit(self, *, expected_digest: bytes | None = None) -> Ticket:
        """All bytes are here: judge, decide, append. Whatever it raises, nothing stays of the instance.

        Raises CannotUnderstand, DatasetMismatch, TooLarge, Corrupt (the digest differs from
        `expected_digest`), OtherContent, OutOfResources, SyncFailed.
        """
        if self._ended:
            raise ValueError("this reception has ended")
        try:
            return self._commit(expected_digest)
        finally:
            self.abort()

    def _commit(self, expected_digest: bytes | None) -> Ticket:
        head = self._head
        content, digest = self._content()
        if expected_digest is not None and digest != expected_digest:
            raise Corrupt("the bytes that arrived do not match their digest")
        with _dataset(content) as dataset:
            attributes = scan(dataset, head.transfer_syntax_uid)
        _require_match(head, attributes)
        return self._intake.take(
            head, attributes, digest, content, conflict=self._conflict, policy=self._policy
        )

    def _content(self) -> tuple[Content, bytes]:
        if self._own is not None:
            return self._own, self._own.digest()
        if self._image is not None:
            return self._image, self._running.digest()
        whole = self._pieces[0] if len(self._pieces) == 1 else b"".join(self._pieces)
        return whole, hashlib.sha256(whole).digest()

    def suspend(self) -> int:
        """The sender was cut off: what came is kept to go on with, where that was provided for; how many
        bytes that are. Ends it like `abort`."""
        kept = 0
        if self._partial is not None and self._own is not None and not self._ended:
            partial, self._partial = self._partial, None
            own, self._own = self._own, None
            kept = self._intake.partials.keep(partial, own)
        self.abort()
        return kept

    def abort(self) -> None:
        """Let go of everything; what was committed stays. Any number of times."""
        self._ended = True
        self._pieces = []
        image, self._image = self._image, None
        if image is not None:
            image.release()
        own, self._own = self._own, None
        if own is not None:
            with contextlib.suppress(OSError):
                own.abort()
            if self._partial is not None:
                self._intake.partials.over(own.name)
        granted, self._granted = self._granted, 0
        if granted:
            self._intake.budget.give_back(granted)


@contextmanager
def _dataset(content: Content) -> Iterator[Buffer]:
    if isinstance(content, OwnPack):
        with content.dataset() as dataset:
            yield dataset
    else:
        yield content.dataset if isinstance(content, RecordImage) else content


def _require_match(head: InstanceHead, attributes: Attributes) -> None:
    """PS3.4 B.2.3: the data set is of the class and the instance that the command named."""
    if attributes.instance.get("SOPInstanceUID") != head.sop_instance_uid:
        raise DatasetMismatch("the data set's SOP Instance UID is not the command's")
    if attributes.instance.get("SOPClassUID") != head.sop_class_uid:
        raise DatasetMismatch("the data set's SOP Class UID is not the command's")
