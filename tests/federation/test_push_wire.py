"""What a push stream carries: written by hand it is what protobuf writes, and read by hand what protobuf
reads, whatever the bytes are."""

from __future__ import annotations

import time
from collections.abc import Callable

import pytest
from google.protobuf.message import DecodeError
from hypothesis import given, settings
from hypothesis import strategies as st

from federation import push_wire
from federation.push_wire import Chunk, Group, PushMessage, read
from protos import common_pb2, uplink_pb2

Wholes = list[tuple[uplink_pb2.PushBegin, list[bytes], bytes]]

begins = st.builds(
    lambda uid, size, conflict: uplink_pb2.PushBegin(
        head=common_pb2.InstanceHead(sop_instance_uid=uid), size=size, conflict=conflict
    ),
    st.text(st.characters(codec="utf-8"), max_size=200), st.integers(-(2**63), 2**63 - 1), st.booleans(),
)  # fmt: skip
pieces = st.lists(st.binary(max_size=300), max_size=3)
groups = st.lists(st.tuples(begins, pieces, st.binary(max_size=40)), min_size=1, max_size=4)


def requests() -> st.SearchStrategy[uplink_pb2.PushRequest]:
    wholes = st.builds(
        lambda begin, dataset, digest: uplink_pb2.PushWhole(begin=begin, dataset=dataset, digest=digest),
        st.one_of(st.none(), begins), st.binary(max_size=300), st.binary(max_size=40),
    )  # fmt: skip
    return st.one_of(
        st.builds(lambda data: uplink_pb2.PushRequest(chunk=data), st.binary(max_size=400)),
        st.builds(
            lambda objects: uplink_pb2.PushRequest(group=uplink_pb2.PushGroup(objects=objects)),
            st.lists(wholes, max_size=4),
        ),
        st.builds(lambda begin: uplink_pb2.PushRequest(begin=begin), begins),
        st.builds(lambda data: uplink_pb2.PushRequest(zstd_group=data), st.binary(max_size=400)),
        st.builds(
            lambda digest: uplink_pb2.PushRequest(end=uplink_pb2.PushEnd(digest=digest)),
            st.binary(max_size=40),
        ),
    )


def as_protobuf(message: PushMessage) -> uplink_pb2.PushRequest:
    if isinstance(message, Chunk):
        return uplink_pb2.PushRequest(chunk=bytes(message.data))
    if isinstance(message, Group):
        wholes = [
            uplink_pb2.PushWhole(begin=one.begin, dataset=bytes(one.dataset), digest=one.digest)
            for one in message.objects
        ]
        return uplink_pb2.PushRequest(group=uplink_pb2.PushGroup(objects=wholes))
    return message


def means_the_same(data: bytes) -> None:
    try:
        expected = uplink_pb2.PushRequest.FromString(data)
    except DecodeError:
        with pytest.raises(DecodeError):
            read(data)
        return
    found = as_protobuf(read(data))
    expected.DiscardUnknownFields()
    found.DiscardUnknownFields()
    assert found.SerializeToString(deterministic=True) == expected.SerializeToString(deterministic=True)


@given(groups)
def test_a_group_is_written_as_protobuf_reads_it(wholes: Wholes) -> None:
    data = push_wire.group(push_wire.group_body(wholes))
    found = uplink_pb2.PushRequest.FromString(data).group.objects
    assert [(one.begin, one.dataset, one.digest) for one in found] == [
        (begin, b"".join(parts), digest) for begin, parts, digest in wholes
    ]
    message = read(data)
    assert isinstance(message, Group) and message.octets == len(data)
    means_the_same(data)


@pytest.mark.parametrize("size", [0, 1, 127, 128, 16_383, 16_384, 1 << 20, (2 << 20) + 5])
def test_a_chunk_is_written_as_protobuf_writes_it(size: int) -> None:
    data = bytes(size)
    assert push_wire.chunk(data) == uplink_pb2.PushRequest(chunk=data).SerializeToString()
    message = read(push_wire.chunk(data))
    assert isinstance(message, Chunk) and message.data == data


def test_a_data_set_is_not_copied_on_its_way_in() -> None:
    data = push_wire.group(push_wire.group_body([(uplink_pb2.PushBegin(size=5), [b"abc", b"de"], b"d")]))
    message = read(data)
    assert isinstance(message, Group)
    dataset = message.objects[0].dataset
    assert isinstance(dataset, memoryview) and dataset.obj is data and bytes(dataset) == b"abcde"


def test_a_million_empty_objects_are_read_in_a_moment() -> None:
    data = push_wire.group(b"\x0a\x06\x0a\x00\x12\x00\x1a\x00" * 500_000)
    begun_s = time.process_time()
    message = read(data)
    assert isinstance(message, uplink_pb2.PushRequest) and len(message.group.objects) == 500_000
    assert time.process_time() - begun_s < 2.0  # of CPU; by hand it was 7


@settings(max_examples=400)
@given(st.one_of(requests().map(lambda one: one.SerializeToString()), st.binary(max_size=60)))
def test_whatever_comes_means_what_protobuf_says(data: bytes) -> None:
    means_the_same(data)


@settings(max_examples=600)
@given(requests(), st.data())
def test_so_it_does_when_bytes_of_it_are_changed_cut_or_said_twice(
    request: uplink_pb2.PushRequest, data: st.DataObject
) -> None:
    octets = request.SerializeToString()
    changes: list[Callable[[], bytes]] = [
        lambda: octets[: data.draw(st.integers(0, len(octets)))],
        lambda: octets + data.draw(requests()).SerializeToString(),
        lambda: octets + data.draw(st.binary(max_size=8)),
    ]
    if octets:
        at = data.draw(st.integers(0, min(len(octets) - 1, 30)))
        changes.append(lambda: octets[:at] + data.draw(st.binary(min_size=1, max_size=2)) + octets[at + 1 :])
    means_the_same(data.draw(st.sampled_from(changes))())
