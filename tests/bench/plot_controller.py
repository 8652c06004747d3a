"""Draws docs/controller.svg: how prefetching makes way, in one simulated scenario (`simulation.py`).

    python tests/bench/plot_controller.py [FILE]

One image is prefetched over a link of 50 MB/s that serves in the order of arrival. A guest reads 4 KiB at
random for a while, then another client loads the link with one read of 1 MiB after the other, and later
with bursts of four at a time. Shaded is what the controller of the link is at. Needs matplotlib.
"""

from __future__ import annotations

import importlib
import sys
from pathlib import Path
from typing import Any

import trio

sys.path.insert(0, str(Path(__file__).parents[2]))
sys.path.insert(0, str(Path(__file__).parents[1]))

from fvdfs.prefetch.manners import State
from support.simulation import Guest, Log, SimulatedLink, States, machine, percentile, rival, simulate

FILE = Path(__file__).parents[2] / "docs" / "controller.svg"
RATE = 50e6
LATENCY = 2e-4
END = 40.0
STEP = 0.2  # seconds that one point of a line is the average of
QUIET_GUEST = (5.0, 12.0)
BUSY_GUEST = (19.0, 24.0)
RIVAL = (15.0, 23.0)
BURSTS = (29.0, 35.0)
MEANINGS = {
    State.CHECK: "prefetching got slower: it sends single requests, to see whether others use the link",
    State.YIELD: "they do: it goes on with one request at a time, an eighth of the time, then looks again",
}
COLORS = {State.RUN: "white", State.CHECK: "#f5c542", State.YIELD: "#e8a0a0"}


async def scenario() -> tuple[dict[str, Log], Guest, States]:
    """Run it; who got what of the link, how long the guest waited, and the states of the controller."""
    link = SimulatedLink(RATE, LATENCY)
    guest = Guest()
    states = States()
    async with machine(link) as mount:
        image = await mount.open(1 << 36)
        mount.prefetch(image)
        mount.start(states.watch, lambda: mount.watch.watch.manners)
        mount.start(rival, link, *RIVAL)
        mount.start(lambda: rival(link, *BURSTS, 4, on=1, off=1))
        for begin, end in (QUIET_GUEST, BUSY_GUEST):
            await trio.sleep_until(begin)
            with trio.move_on_at(end):
                await mount.guest(image, guest, (1 << 35, 1 << 36), think=0.02)
        await trio.sleep_until(END)
    return link.logs, guest, states


def main(file: Path) -> None:
    """Draw it."""
    logs, guest, states = simulate(scenario)
    times = [step * STEP for step in range(round(END / STEP))]

    def rates(who: str) -> list[float]:
        log = logs.get(who, Log())
        return [log.rate(at, at + STEP) / 1e6 for at in times]

    def wait(at: float, share: float) -> float:
        """Milliseconds that this share of the guest's reads do not exceed; none where it does not read."""
        found = guest.latencies(at, at + STEP)
        return percentile(found, share) * 1e3 if found else float("nan")

    matplotlib: Any = importlib.import_module("matplotlib")  # not needed by anything else, its types neither
    pyplot: Any = importlib.import_module("matplotlib.pyplot")
    pyplot.switch_backend("svg")
    matplotlib.rcParams.update({"svg.hashsalt": "fvdfs", "font.size": 9})
    figure, (offered, latency, fetched) = pyplot.subplots(3, 1, sharex=True, figsize=(9, 7), layout="constrained")
    offered.plot(times, rates("rival"), label="another client", color="#b03030")
    offered.plot(times, rates("guest"), label="the guest", color="#3060b0")
    offered.set_ylabel("others get, MB/s")
    latency.plot(times, [wait(at, 0.5) for at in times], label="half of its reads take up to", color="#3060b0")
    latency.plot(times, [wait(at, 0.95) for at in times], label="95 % of them", color="#90b0e0")
    latency.set_yscale("log")
    latency.yaxis.set_major_formatter("{x:g}")
    latency.set_ylabel("guest's read, ms")
    fetched.plot(times, rates("prefetch"), label="prefetching", color="#207040")
    fetched.set_ylabel("prefetched, MB/s")
    fetched.set_xlabel("seconds")
    for axes in (offered, latency, fetched):
        for begin, end, state in states.spans(END):
            if state is not State.RUN:
                axes.axvspan(begin, end, color=COLORS[state], linewidth=0)
        axes.set_xlim(0, END)
        axes.grid(alpha=0.3)
    for axes in (offered, latency, fetched):
        axes.legend(loc="lower right", bbox_to_anchor=(1, 1), ncols=2, frameon=False, borderaxespad=0.1)
    patch = importlib.import_module("matplotlib.patches").Patch
    spans = [patch(color=COLORS[state], label=f"{state.name}: {MEANINGS[state]}") for state in MEANINGS]
    figure.legend(handles=spans, loc="outside lower center", ncols=1, frameon=False, alignment="left")
    file.parent.mkdir(exist_ok=True)
    figure.savefig(file, metadata={"Date": None})
    print(f"{file}: {file.stat().st_size / 1024:.0f} KiB, {len(states.changes)} changes of state")


if __name__ == "__main__":
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else FILE)
