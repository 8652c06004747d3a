"""Checking an image and all that it stands on, and repairing it: what `fvdfs check` does.

The files are opened one by one, so that a missing one hides as little as possible, and locked: for
reading, or, where the image is to be repaired, its own files exclusively. Each image of the chain is
examined by itself (`examine.py`). Only the image that was named is repaired (`repair.py`), its bases
never; then all are examined once more, to tell what is left.
"""

from __future__ import annotations

import errno
import functools
import os
from collections import Counter
from contextlib import AsyncExitStack
from dataclasses import dataclass, replace
from typing import Any

from fvdfs.check.examine import Examined, examine
from fvdfs.check.findings import Finding, Findings, Kind, Severity
from fvdfs.check.header import check_header
from fvdfs.check.layers import Absent, CheckLayer, is_store, read
from fvdfs.check.repair import repair_image
from fvdfs.daemon import run_loop
from fvdfs.errors import FvdError, ImageBusy, ImageError, Locked, Refused, UnstatedFormat, UsageError, printable, told
from fvdfs.format.header import HEADER_SPACE, Header
from fvdfs.image.chain import open_named, unstated_base_format
from fvdfs.image.locking import lock_for_reading
from fvdfs.image.migration import refuse_moved
from fvdfs.image.policy import FVD_FORMAT, HostStore, Policy
from fvdfs.store.host import HostFile, open_path
from fvdfs.store.locations import is_local
from fvdfs.store.qemu_store import QemuStore

SHOWN = 20  # findings of a kind in text, so that a report fits a terminal; --json has all


@dataclass(slots=True)
class Report:
    """What a check has found, what of it was repaired, and what is left."""

    image: str
    chain: list[dict[str, Any]]
    """Of each image and the lowest base: name, format, size of its disk in bytes."""
    findings: list[Finding]
    unlisted: Counter[tuple[Kind, Severity]]
    """Findings that were counted, but not listed."""
    left: Counter[Severity]
    """Findings that are left after a repair; without one, all."""
    errors: list[str]
    """What could not be done; if anything, the check is not complete."""
    repair: bool
    """Whether a repair was asked for."""

    @property
    def exit_code(self) -> int:
        """As of `qemu-img check`: 0 clean, 1 not completed, 2 corrupt, 3 leaks only."""
        if self.errors:
            return 1
        if self.left[Severity.CORRUPTION]:
            return 2
        return 3 if self.left[Severity.LEAK] else 0


def check_image(path: str, *, repair: bool = False, secret_file: str = "", roots: tuple[str, ...] = ()) -> Report:
    """Check the image at `path`, and with `repair` repair it as far as possible. Blocks; only from the main thread.

    `roots`: real paths of the folders, beside the image's own, whose data files a repair may write to.

    Raises NotFvd where it is no image, ImageBusy where it is in use, Refused where a repair would write to a
    file elsewhere, ImageError where it cannot be opened.
    """
    try:
        roots = (os.path.realpath(os.path.dirname(path) or "."), *roots)
        secret_file = os.path.abspath(secret_file) if secret_file else ""
        return run_loop(functools.partial(_check_image, path, repair, secret_file, roots))
    except MemoryError:
        raise ImageError(path, "its metadata is larger than the memory that there is for it") from None


async def _check_image(path: str, repair: bool, secret_file: str, roots: tuple[str, ...]) -> Report:
    async with AsyncExitStack() as stack:
        errors: list[str] = []
        opening = _Opening(Policy(writable=repair, secret_file=secret_file), roots, stack, errors)
        try:
            layers = await opening.open(path)
        except OSError as error:
            raise ImageError(path, f"cannot be read: {error.strerror or error}") from error
        return await check_layers(layers, repair=repair, errors=errors)


async def check_layers(layers: list[CheckLayer], *, repair: bool, errors: list[str]) -> Report:
    """Check a chain, from the top, whose files are open and locked; with `repair`, repair the top.

    `errors`: what could not be opened, and why. Raises NotFvd.
    """
    first = [await examine(layer) for layer in layers]
    last = first
    failed: list[str] = []
    if repair and first[0].findings.to_repair:
        try:
            await repair_image(layers[0], first[0])
        except (OSError, ImageError) as error:
            failed.append(f"{layers[0].path}: the repair ended early: {error}")
        last = [await examine(layer) for layer in layers]
    found = [finding for examined in first for finding in examined.findings.listed]
    now = {finding.key: finding for examined in last for finding in examined.findings.listed}
    before = {finding.key for finding in found}
    shown = [replace(finding, repaired=last is not first and finding.key not in now) for finding in found]
    shown += [finding for key, finding in now.items() if key not in before]
    unlisted: Counter[tuple[Kind, Severity]] = Counter()
    for examined in last:
        unlisted.update(examined.findings.unlisted)
    return Report(
        image=layers[0].path,
        chain=_describe(layers, last),
        findings=shown,
        unlisted=unlisted,
        left=Counter({s: sum(examined.findings.count(s) for examined in last) for s in Severity}),
        errors=[printable(e) for e in dict.fromkeys([*errors, *failed, *(e for ex in last for e in ex.errors)])],
        repair=repair,
    )


def _describe(layers: list[CheckLayer], examined: list[Examined]) -> list[dict[str, Any]]:
    chain: list[dict[str, Any]] = []
    for layer, found in zip(layers, examined, strict=True):
        size = found.header.virtual_disk_size if found.check is not None else None
        chain.append({"image": layer.path, "format": FVD_FORMAT, "size": size})
    base, last = layers[-1].base, examined[-1]
    if is_store(base) and last.base_size is not None:
        chain.append({"image": base.name, "format": layers[-1].base_format, "size": last.base_size})
    return chain


# --- opening ----------------------------------------------------------------------------------------


class _NotWritable(ImageError):
    """There is no permission to write to a file that a repair has to write to."""


class _Opening:
    """Opens and locks an image and those of its data files and bases that exist."""

    def __init__(self, policy: Policy, roots: tuple[str, ...], stack: AsyncExitStack, errors: list[str]) -> None:
        """The stack closes what is opened. `errors`: takes errors that are no fault of the image.

        Files to be read may lie anywhere, files to be written only in the `roots`.
        """
        self._policy = policy
        self._own_policy = replace(policy, roots=roots) if policy.writable else policy
        self._stack = stack
        self._errors = errors
        self._seen: dict[object, str] = {}

    async def open(self, path: str) -> list[CheckLayer]:
        """The chain, from the top. Raises NotFvd, ImageBusy, ImageError, OSError, of `path` itself only."""
        try:
            top = open_path(path, writable=self._policy.writable)
        except OSError as error:
            raise ImageError(path, error.strerror or str(error)) from error
        meta: HostStore = top
        await self._take(meta, "image", own=True)
        if self._policy.writable:
            refuse_moved(top)
        layers: list[CheckLayer] = []
        while True:
            layer = CheckLayer(path, meta, is_base=bool(layers))
            if layers:
                layers[-1].base = layer
            layers.append(layer)
            check = check_header(await read(meta, 0, HEADER_SPACE), await meta.size(), Findings(path))
            if check is None:
                return layers
            header = check.header
            if not header.data_file:
                layer.data = meta
            elif not check.doubtful & {"data_file", "data_file_fmt"}:
                layer.data = await self._open_data(layer, header)
            if not header.has_base or check.doubtful & {"base_img", "base_img_fmt"}:
                return layers
            below = await self._open_base(layer, header)
            layer.base = below
            if layer.base_format != FVD_FORMAT or isinstance(below, Absent):
                return layers
            path = os.path.join(os.path.dirname(path), header.base_img)
            meta = below

    async def _take(self, store: HostStore, what: str, *, own: bool) -> None:
        """Start and lock the store, and leave closing it to the stack.

        Raises ImageBusy, ImageError, UsageError, OSError.
        """
        self._stack.push_async_callback(store.aclose)
        if isinstance(store, QemuStore):
            await store.start()
        repair = own and self._policy.writable
        if repair and not store.writable:
            raise _NotWritable(store.name, "no permission to write to it")
        if repair:
            store.lock(exclusive=True)
            store.claim_device()
        else:
            await lock_for_reading([store])
            if isinstance(store, HostFile) and store.file_lock.is_being_filled():
                raise ImageBusy(store.name, "a mount fills it with what its disks read; unmount that first")
        self._seen[store.identity] = f"the {what} {store.name}"

    async def _open_data(self, layer: CheckLayer, header: Header) -> HostStore | Absent:
        name, file_format = header.data_file, header.data_file_fmt
        own = not layer.is_base
        policy = self._own_policy if own else self._policy
        try:
            store = open_named(layer.path, "data_file", name, file_format, policy, writable=own and policy.writable)
            if store.identity in self._seen:
                other = self._seen[store.identity]
                await store.aclose()
                return Absent(Kind.SAME_FILE, Severity.CORRUPTION, f"is {other}: each overwrites the other")
            await self._take(store, "data file", own=own)
        except (ImageBusy, _NotWritable):
            raise
        except Refused as error:
            if own and self._policy.writable and is_local(name):
                raise
            return self._absent(error, Kind.DATA_MISSING, Kind.DATA_UNUSABLE, Kind.DATA_UNCHECKED)
        except (FvdError, OSError) as error:
            return self._absent(error, Kind.DATA_MISSING, Kind.DATA_UNUSABLE, Kind.DATA_UNCHECKED)
        return store

    async def _open_base(self, layer: CheckLayer, header: Header) -> HostStore | Absent:
        name, file_format = header.base_img, header.base_img_fmt
        try:
            layer.base_format = file_format or unstated_base_format(layer.path, header, self._policy)
            is_fvd = layer.base_format == FVD_FORMAT
            store = open_named(
                layer.path, "base_img", name, "" if is_fvd else file_format, self._policy, writable=False
            )
            if store.identity in self._seen:
                other = self._seen[store.identity]
                await store.aclose()
                kind = Kind.CHAIN_LOOP if other.startswith("the image") else Kind.SAME_FILE
                return Absent(kind, Severity.CORRUPTION, f"is {other}, which stands on it")
            await self._take(store, "image" if is_fvd else "base image", own=False)
            if is_fvd and not isinstance(store, HostFile):
                return Absent(Kind.BASE_UNUSABLE, Severity.CORRUPTION, "an FVD image must be a file of this host")
            if is_fvd:
                check_header(await read(store, 0, HEADER_SPACE), await store.size(), Findings(store.name))
        except ImageBusy:
            raise
        except (FvdError, OSError) as error:
            return self._absent(error, Kind.BASE_MISSING, Kind.BASE_UNUSABLE, Kind.BASE_UNCHECKED)
        return store

    def _absent(self, error: Exception, missing: Kind, unusable: Kind, unchecked: Kind) -> Absent:
        """The finding about an image that a file which it names cannot be opened."""
        text = error.reason if isinstance(error, ImageError) else str(error)
        cause = error if isinstance(error, OSError) else error.__cause__
        if isinstance(error, UnstatedFormat):
            return Absent(Kind.BASE_FORMAT, Severity.CORRUPTION, text, "cannot be repaired before that is settled")
        if isinstance(error, Refused):
            return Absent(unchecked, Severity.HARMLESS, "a URL is not followed: what is there was not checked")
        if isinstance(error, Locked) and not self._policy.secret_file:
            return Absent(unchecked, Severity.HARMLESS, "is encrypted: to check it, give its passphrase by --secret")
        if isinstance(error, Locked | UsageError) or (isinstance(cause, OSError) and cause.errno not in _NOT_THERE):
            self._errors.append(str(error))
            return Absent(unchecked, Severity.HARMLESS, "could not be checked")
        if isinstance(cause, OSError):
            return Absent(missing, Severity.CORRUPTION, f"is missing: {told(cause)}")
        return Absent(unusable, Severity.CORRUPTION, f"cannot be used: {text}")


_NOT_THERE = (errno.ENOENT, errno.ENOTDIR, errno.ELOOP, errno.ENAMETOOLONG)


# --- reporting --------------------------------------------------------------------------------------


def describe(report: Report) -> dict[str, Any]:
    """The report, ready for JSON."""
    return {
        "image": report.image,
        "chain": report.chain,
        "findings": [_facts(finding) for finding in report.findings],
        "unlisted": [
            {"kind": str(kind), "severity": str(severity), "count": count}
            for (kind, severity), count in report.unlisted.items()
        ],
        "errors": report.errors,
        "repair": report.repair,
        "repaired": sum(finding.repaired for finding in report.findings),
        "left": {str(severity): report.left[severity] for severity in Severity},
        "exit_code": report.exit_code,
    }


def _facts(finding: Finding) -> dict[str, Any]:
    return {
        "kind": str(finding.kind),
        "severity": str(finding.severity),
        "image": finding.image,
        "place": finding.place,
        "value": finding.value,
        "text": finding.text,
        "repairable": finding.repairable,
        "repaired": finding.repaired,
        "repair": finding.repair,
        "lost": [list(lost) for lost in finding.lost],
        "line": finding.line,
    }


def render(report: Report) -> str:
    """The report as text for a terminal: a line for each finding, and one for all."""
    lines = []
    counts: Counter[Kind] = Counter()
    for finding in report.findings:
        counts[finding.kind] += 1
        if counts[finding.kind] <= SHOWN:
            lines.append(f"{finding.severity} {finding.kind}: {finding.line} [{_end(finding, repair=report.repair)}]")
    for (kind, _), count in report.unlisted.items():
        counts[kind] += count
    lines += [
        f"{count - SHOWN} more findings of {kind}; --json lists them" for kind, count in counts.items() if count > SHOWN
    ]
    lines += [f"error: {error}" for error in report.errors]
    return "\n".join([*lines, f"{printable(report.image)}: {_summary(report)}"])


def _end(finding: Finding, *, repair: bool) -> str:
    if finding.repaired:
        return f"repaired: {finding.repair}" if finding.repairable else "gone with what was repaired"
    if not finding.repairable:
        return finding.repair
    return f"could not be repaired: {finding.repair}" if repair else f"--repair {finding.repair}"


def _summary(report: Report) -> str:
    repaired = sum(finding.repaired for finding in report.findings)
    repairable = sum(finding.repairable and not finding.repaired for finding in report.findings)
    names = {
        Severity.CORRUPTION: ("corruption", "corruptions"),
        Severity.LEAK: ("leak", "leaks"),
        Severity.HARMLESS: ("harmless finding", "harmless findings"),
    }
    left = ", ".join(f"{n} {names[s][n > 1]}" for s in Severity if (n := report.left[s]))
    text = left or ("clean now" if report.repair and repaired else "clean")
    if report.repair and repaired:
        text = f"{repaired} repaired; " + (f"left: {left}" if left else "clean now")
    elif repairable and not report.repair:
        text += f"; {repairable} repairable with --repair"
    return f"{text}; the check is not complete" if report.errors else text
