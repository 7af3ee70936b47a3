"""Checks by all ranks of a job: each checks its host, then one rank of each host measures the links."""

from __future__ import annotations

import datetime
import itertools
import json
import os
import socket
from collections.abc import Mapping
from typing import Any

from paceline.comm.rendezvous.environment import ProcessIdentity, who_am_i
from paceline.comm.rendezvous.meeting import Meeting, meet
from paceline.doctor import host, link, network
from paceline.doctor.finding import OK, PROBLEM, Finding
from paceline.errors import PacelineError

_ALL_PAIRS_HOSTS = 8
_PER_LINK_S = 20.0
_MUST_AGREE = ("paceline", "torch")


def examine(timeout_s: float = 30.0) -> list[dict[str, Any]]:
    """All findings of the job, as JSON objects.

    Only rank 0 returns them, unless the ranks cannot meet: then each returns its own.

    Args:
        timeout_s: Seconds to wait for the other ranks.
    """
    place = who_am_i(os.environ)
    here = socket.gethostname()
    mine = [f.at(here) for f in _own(place, os.environ)]
    try:
        meeting = meet(timeout_s=timeout_s)
    except PacelineError as error:
        hint = "see the findings of the other ranks" if place.rank == 0 else "see the findings above"
        fix = (
            f"{hint}; MASTER_ADDR and MASTER_PORT must be the same for all ranks and reachable from each host"
        )
        text = f"rank {place.rank} of {place.size} did not meet the others: {error}"
        return [f.to_json() for f in [*mine, Finding("rendezvous", PROBLEM, text, fix, here)]]
    text = f"{place.size} ranks on {len(set(meeting.hosts))} hosts met ({place.launcher})"
    met = Finding("rendezvous", OK, text, where=here)
    return _together(meeting, [*mine, met] if place.rank == 0 else mine, timeout_s)


def _own(place: ProcessIdentity, environment: Mapping[str, str]) -> list[Finding]:
    if place.local_rank > 0:
        return []
    found = [network.interfaces(), *host.examine(local_ranks=place.local_size, environment=environment)]
    if place.rank > 0 and place.master_address:
        address, resolved = network.resolve(place.master_address)
        found.append(resolved)
        if address is not None:
            found.append(network.route(address))
            if place.master_port:
                found.append(network.port(address, place.master_port))
    return found


def _together(meeting: Meeting, mine: list[Finding], timeout_s: float) -> list[dict[str, Any]]:
    """Measure one link after the other, so that they do not disturb each other; then rank 0 collects."""
    store, rank = meeting.store, meeting.rank
    leaders = _leaders(meeting)
    pairs = _pairs(leaders)
    limit = datetime.timedelta(seconds=timeout_s + _PER_LINK_S * (len(pairs) + 1))
    responder = (
        link.LinkResponder(meeting.secret, meeting.address or "127.0.0.1") if rank in leaders else None
    )
    try:
        if responder is not None:
            store.set(f"doctor/port/{rank}", str(responder.port))
        for number, (a, b) in enumerate(pairs):
            if a != rank:
                continue
            store.wait([f"doctor/port/{b}", *([f"doctor/done/{number - 1}"] if number else [])], limit)
            address = meeting.addresses[b] or "127.0.0.1"
            found = link.measure(address, int(store.get(f"doctor/port/{b}")), meeting.secret)
            where = f"{_end(meeting, a)} -> {_end(meeting, b)}"
            mine += [f.at(where) for f in ([network.route(address)] if meeting.addresses[b] else [])]
            mine += [f.at(where) for f in found]
            store.set(f"doctor/done/{number}", "")
        store.set(f"doctor/report/{rank}", json.dumps([f.to_json() for f in mine]))
        if rank == 0:
            reports = [f"doctor/report/{r}" for r in range(meeting.size)]
            store.wait(reports, limit)
            everything = [finding for key in reports for finding in json.loads(store.get(key))]
            store.set("doctor/over", "")
            return [*everything, *(f.to_json() for f in _agreement(everything))]
        store.wait(["doctor/over"], limit)
        return []
    finally:
        if responder is not None:
            responder.close()


def _leaders(meeting: Meeting) -> list[int]:
    """The first rank of each host; on a single host the first two ranks."""
    first = {h: meeting.hosts.index(h) for h in dict.fromkeys(meeting.hosts)}
    return list(first.values()) if len(first) > 1 else list(range(min(2, meeting.size)))


def _pairs(leaders: list[int]) -> list[tuple[int, int]]:
    """Both directions between all leaders, or only a ring if there are many hosts."""
    if len(leaders) <= _ALL_PAIRS_HOSTS:
        return list(itertools.permutations(leaders, 2))
    return [(a, leaders[(i + 1) % len(leaders)]) for i, a in enumerate(leaders)]


def _end(meeting: Meeting, rank: int) -> str:
    """The name of one end of a link: the host, by its short name if that is unique; the rank on one host."""
    if len(set(meeting.hosts)) == 1:
        return f"rank {rank}"
    names = {h: h.rpartition("-")[0] or h for h in meeting.hosts}
    return names[meeting.hosts[rank]] if len(set(names.values())) == len(names) else meeting.hosts[rank]


def _agreement(everything: list[dict[str, Any]]) -> list[Finding]:
    """Findings about versions that differ between hosts."""
    versions = [(f["where"], f["values"]) for f in everything if f["check"] == "versions" and f["values"]]
    found = []
    for name in _MUST_AGREE:
        have = {where: values.get(name) for where, values in versions}
        if len(set(have.values())) > 1:
            text = f"{name} differs between hosts: " + ", ".join(f"{h} {v}" for h, v in sorted(have.items()))
            fix = f"install the same version of {name} on all hosts"
            found.append(Finding("versions", PROBLEM, text, fix, "all hosts", {"versions": have}))
    return found
