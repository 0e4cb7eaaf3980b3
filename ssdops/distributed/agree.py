"""Whether the ranks of a group make one call, told before the first collective: a collective of unlike tensors would hang.

Ranks tell one another what they are about to do at the job's own key-value store, and not by a collective: that asks nothing of
the device, reads no tensor on the host, and says which rank did not come.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from ..errors import DeviceError, RankError, SsdopsError


@dataclass
class Team:
    """The ranks of one process group, as a rank of it sees them.

    Attributes:
        group: the process group.
        rank, size: in the group.
        calls: how many times they have agreed on something.
    """

    group: dist.ProcessGroup
    rank: int
    size: int
    calls: int = field(default=0)

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

    def agree(self, facts: Mapping[str, Any], shapes: str, error: SsdopsError | None = None) -> list[dict[str, Any]]:
        """What every rank is about to do, once all have said so and it is the same.

        Args:
            facts: what must be the same on all of them, but for `own`, which may differ.
            shapes: this rank's tensors, for the message.
            error: why this rank cannot go on; then none does.

        Returns:
            The facts of every rank, in their order.

        Raises:
            RankError: a rank does something else, cannot go on, or does not come within the group's timeout.
        """
        text = json.dumps({"facts": dict(facts), "shapes": shapes, "error": None if error is None else _say(error)})
        heard = self._exchange(text)
        known = {x: json.loads(x) for x in set(heard)}  # mostly of one text
        said = [known[x] for x in heard]
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
        return [one["facts"] for one in said]

    def lost(self, error: RuntimeError) -> RankError:
        """What to raise where a collective has failed: the ranks that are left find out who is not."""
        try:
            self._exchange("lost")
        except RankError as found:
            return RankError(f"{found}; it was lost in a collective: {error}")
        return RankError(f"a collective failed, and all {self.size} ranks are there: {error}")

    def _exchange(self, text: str) -> list[str]:
        store: Any = dist.distributed_c10d._get_default_store()
        group = self.group.group_name
        self.calls += 1

        def key(rank: int, call: int) -> str:
            return f"ssdops/{group}/{call}/{rank}"

        try:
            store.set(key(self.rank, self.calls), text)
            keys = [key(rank, self.calls) for rank in range(self.size)]
            self._wait(store, keys)
            values = store.multi_get(keys) if store.has_extended_api() else [store.get(name) for name in keys]
            store.delete_key(key(self.rank, self.calls - 1))  # all have read it: they have come to this one since
        except dist.DistNetworkError as error:
            raise RankError(f"the job's store cannot be reached, so the process that keeps it is gone: {error}") from error
        return [value.decode() for value in values]

    def _wait(self, store: Any, keys: list[str]) -> None:
        timeout = self.timeout
        try:
            store.wait(keys, timeout)
        except dist.DistStoreError as error:
            missing = [str(rank) for rank, name in enumerate(keys) if not store.check([name])]
            raise RankError(
                f"rank {', '.join(missing)} of {self.size} did not come within {timeout.total_seconds():g} s, the timeout of "
                "the group: it is dead, or makes no call of ssdops.distributed here"
            ) from error

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


def _say(error: SsdopsError) -> str:
    return f"{type(error).__name__}: {error}"
