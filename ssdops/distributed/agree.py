"""Whether the ranks of a group make one call, told before the first collective: a collective of unlike tensors would hang.

Ranks tell one another what they are about to do at the job's own key-value store, and not by a collective: that asks nothing of
the device, reads no tensor on the host, and says which rank did not come.

What all have said before, word for word, they need only count: each adds one to what that text has at the store, and begins
what needs no other rank. The last to come says so, and before its first collective (`settle`) every other waits for that. Who
waits longer than `PATIENCE` says its text after all, and hears the others'.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import timedelta
from functools import cached_property
from typing import Any

import torch
import torch.distributed as dist

from ..errors import DeviceError, RankError, SsdopsError

PATIENCE, PAUSE = 1.0, 1e-3
"""Seconds after which a rank no longer only waits for the last to come, and torch warns; and between two looks from then on."""


@dataclass(frozen=True)
class Saying:
    """What a rank is about to do.

    Attributes:
        facts: what must be the same on all ranks, but for `own`, which may differ.
        shapes: this rank's tensors, for the message.
        error: why this rank cannot go on; then none does.
    """

    facts: Mapping[str, Any]
    shapes: str
    error: SsdopsError | None = None

    @cached_property
    def text(self) -> str:
        """As it goes to the store."""
        error = None if self.error is None else f"{type(self.error).__name__}: {self.error}"
        return json.dumps({"facts": dict(self.facts), "shapes": self.shapes, "error": error})


@dataclass
class Alike:
    """A text that all ranks have said, and that is counted since a call in which all said theirs.

    Attributes:
        name: of the text.
        facts: of every rank.
        since: that call.
        uses: how often this rank has counted.
    """

    name: str
    facts: list[dict[str, Any]]
    since: int = 0
    uses: int = 0


@dataclass(frozen=True)
class Counting:
    """A call whose text this rank has counted and others may not have yet.

    Attributes:
        saying: what it would say.
        key: of the count at the store; last: of what the last to come puts there.
        come, wanted: how many times any had come when this rank had, and how many times they are to.
    """

    saying: Saying
    key: str
    last: str
    come: int
    wanted: int


@dataclass
class Team:
    """The ranks of one process group, as a rank of it sees them.

    Attributes:
        group: the process group.
        rank, size: in the group.
        calls: how many times they have agreed on something.
        alike: texts that all have said, until one says another.
    """

    group: dist.ProcessGroup
    rank: int
    size: int
    calls: int = field(default=0)
    alike: dict[str, Alike] = field(default_factory=dict)
    _counting: Counting | None = None
    _said: list[int] = field(default_factory=list)  # the calls whose texts of this rank are still at the store

    def check_device(self, device: torch.device) -> None:
        """Whether the group moves tensors of that device.

        Raises:
            DeviceError: it has no backend for them.
        """
        try:
            self.group._get_backend(device)
        except RuntimeError:
            name = dist.get_backend(self.group)
            raise DeviceError(
                f"the tensors are on {device}, and the group's backend {name!r} moves none of {device.type}; move them, or "
                "make a group that does (gloo for CPUs, nccl for CUDA GPUs)"
            ) from None

    def agree(self, saying: Saying, later: bool = False) -> list[dict[str, Any]]:
        """What every rank is about to do, once all have said so and it is the same.

        Args:
            saying: this rank's.
            later: what all have said before is enough for now: `settle` is called before anything is asked of another rank,
                and what is then found of `own` does not matter.

        Returns:
            The facts of every rank, in their order.

        Raises:
            RankError: a rank does something else, cannot go on, or does not come within the group's timeout.
        """
        self.calls += 1
        self._counting = None
        known = self.alike.get(saying.text)
        if known is not None:
            self._count(known, saying)
            return known.facts if later else self.settle() or known.facts
        return self._told(saying)

    def settle(self) -> list[dict[str, Any]] | None:
        """Wait until all ranks have come to the call that this one has counted; their facts, if one says another text.

        Raises:
            RankError: as `agree` does.
        """
        counting, self._counting = self._counting, None
        if counting is None:
            return None
        with self._checked() as store:
            if counting.come >= counting.wanted or self._all_come(store, counting):
                self._forget(store)
                return None
        return self._told(counting.saying)

    def _told(self, saying: Saying) -> list[dict[str, Any]]:
        """The facts of every rank, each of which says its text."""
        text = saying.text
        with self._checked() as store:
            heard = self._exchange(store, text)
            said = {x: json.loads(x) for x in set(heard)}  # mostly of one text
            self._compare([said[x] for x in heard], saying.error)
        found = [said[x]["facts"] for x in heard]
        if len(said) == 1:
            self.alike[text] = Alike(hashlib.sha256(text.encode()).hexdigest()[:16], found)
        for one in self.alike.values():  # counted anew on all ranks, as all have said something in this call
            one.since, one.uses = self.calls, 0
        return found

    def _compare(self, said: list[dict[str, Any]], error: SsdopsError | None) -> None:
        if error is not None:
            raise type(error)(f"rank {self.rank} of {self.size}: {error}") from error
        for rank, one in enumerate(said):
            if one["error"] is not None:
                raise RankError(f"rank {rank} of {self.size} cannot go on: {one['error']}; its tensors: {one['shapes']}")
        first = said[0]["facts"]
        for rank, one in enumerate(said):
            unlike = [name for name in first if name != "own" and one["facts"].get(name) != first[name]]
            if unlike:
                differing = ", ".join(f"{name} is {one['facts'].get(name)} and not {first[name]}" for name in unlike)
                everyone = "; ".join(f"rank {other}: {x['shapes']}" for other, x in enumerate(said))
                raise RankError(f"rank {rank} of {self.size} makes another call than rank 0: {differing}. {everyone}")

    def lost(self, error: RuntimeError) -> RankError:
        """What to raise where a collective has failed: the ranks that are left find out who is not."""
        self.calls += 1
        self.alike.clear()
        try:
            with self._checked() as store:
                self._exchange(store, "lost")
        except RankError as found:
            return RankError(f"{found}; it was lost in a collective: {error}")
        return RankError(f"a collective failed, and all {self.size} ranks are there: {error}")

    @contextmanager
    def _checked(self) -> Iterator[Any]:
        """The job's store. Where ranks do not agree at it, they count nothing any more until they have said it again."""
        try:
            yield dist.distributed_c10d._get_default_store()
        except dist.DistNetworkError as error:
            self.alike.clear()
            raise RankError(f"the job's store cannot be reached, so the process that keeps it is gone: {error}") from error
        except SsdopsError:
            self.alike.clear()
            raise

    def _count(self, known: Alike, saying: Saying) -> None:
        """Say that this rank has come with a text that all have said before."""
        key = f"ssdops/{self.group.group_name}/{known.since}/{known.name}"
        known.uses += 1
        with self._checked() as store:
            come, wanted = store.add(key, 1), known.uses * self.size
            self._counting = Counting(saying, key, f"{key}/{known.uses}", come, wanted)
            if come == wanted:
                store.set(self._counting.last, "")
            elif come == wanted - 1 and known.uses > 2:  # and the last has gone on from the use before last
                store.delete_key(f"{key}/{known.uses - 2}")

    def _all_come(self, store: Any, counting: Counting) -> bool:
        """Whether as many have come with that text as there are ranks; not if one says another, or counts otherwise."""
        began, limit = time.monotonic(), self.timeout.total_seconds()
        try:
            store.wait([counting.last], timedelta(seconds=PATIENCE))
        except dist.DistStoreError:
            self._say(store, counting.saying.text)
        else:
            return True
        while store.add(counting.key, 0) < counting.wanted:
            there = [rank for rank, name in enumerate(self._keys(self.calls)) if store.check([name])]
            if len(there) == self.size or any(self._read(store, rank) != counting.saying.text for rank in there):
                return False
            if time.monotonic() - began > limit:
                raise self._missing([rank for rank in range(self.size) if rank not in there])
            time.sleep(PAUSE)
        return True

    def _read(self, store: Any, rank: int) -> str:
        text: bytes = store.get(self._keys(self.calls)[rank])
        return text.decode()

    def _exchange(self, store: Any, text: str) -> list[str]:
        """What all ranks say in this call."""
        self._say(store, text)
        keys, timeout = self._keys(self.calls), self.timeout
        try:
            store.wait(keys, timeout)
        except dist.DistStoreError as error:
            raise self._missing([rank for rank, name in enumerate(keys) if not store.check([name])]) from error
        values = store.multi_get(keys) if store.has_extended_api() else [store.get(name) for name in keys]
        self._forget(store)
        return [value.decode() for value in values]

    def _say(self, store: Any, text: str) -> None:
        """Leave a text at the store, once in a call."""
        if self.calls not in self._said:
            store.set(self._keys(self.calls)[self.rank], text)
            self._said.append(self.calls)

    def _forget(self, store: Any) -> None:
        """Take away the texts of earlier calls, which all have read, as all have come to this one."""
        for call in [call for call in self._said if call < self.calls]:
            store.delete_key(self._keys(call)[self.rank])
            self._said.remove(call)

    def _keys(self, call: int) -> list[str]:
        return [f"ssdops/{self.group.group_name}/{call}/{rank}" for rank in range(self.size)]

    def _missing(self, ranks: list[int]) -> RankError:
        return RankError(
            f"rank {', '.join(map(str, ranks))} of {self.size} did not come within {self.timeout.total_seconds():g} s, the "
            "timeout of the group: it is dead, or makes no call of ssdops.distributed here"
        )

    @property
    def timeout(self) -> timedelta:
        """The group's own."""
        kinds = self.group._device_types
        timeout: timedelta = self.group._get_backend(kinds[0]).options._timeout
        return timeout


_teams: dict[tuple[str, int], Team] = {}


def team_of(group: dist.ProcessGroup | None) -> Team | None:
    """The ranks of a group (None: of the job); None where there is one rank, or no job.

    Raises:
        RankError: this process is none of them.
    """
    if not (dist.is_available() and dist.is_initialized()):
        return None
    group = dist.group.WORLD if group is None else group
    if not isinstance(group, dist.ProcessGroup):
        raise RankError("this process is not in the group that it was called with; call it on the group's ranks only")
    size = dist.get_world_size(group)
    if size == 1:
        return None
    key = (group.group_name, id(group))
    team = _teams.get(key)
    if team is None or team.group is not group:
        team = _teams[key] = Team(group, dist.get_rank(group), size)
    return team
