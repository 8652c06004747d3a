"""Coverage-guided fuzzing of everything that reads untrusted bytes. Needs the extra `fuzz` (atheris).

    python tests/fuzz/run.py --target parsers --runs 1000000 --seed 1

Each target (`targets.py`) runs in a process of its own, one after the other, since libFuzzer keeps the
process for itself; it begins with the stored corpus. What is too slow (--timeout) or wants much memory
(MEMORY; the inputs make files of some 100 KiB) is a defect, as is what a target raises: the input is
then written to --output, and the exit code is 1. With --store the corpus is replaced by the smallest
set of inputs that reaches as much.

The table at the end tells for each target how many inputs were run, how many of them were accepted
(parsed, opened), and what libFuzzer counts as coverage: edges, and edges with how often they were taken.
"""

from __future__ import annotations

import argparse
import importlib
import logging
import mmap
import re
import resource
import shutil
import struct
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

HERE = Path(__file__).parent
MEMORY = 256 << 20  # bytes that a process may take beyond what it has when it begins
COUNTS = struct.Struct("<QQ")  # executions, accepted ones
PACKAGE = "fvdfs"


@dataclass
class Result:
    """How the fuzzing of a target ended."""

    target: str
    executions: int = 0
    accepted: int = 0
    seconds: float = 0.0
    edges: int = 0
    features: int = 0
    inputs: int = 0
    failures: list[str] = field(default_factory=list)


def limit_memory() -> None:
    """Let this process take no more than it has now, and MEMORY."""
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    limit = pages * resource.getpagesize() + MEMORY
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))


def work(target: str, counts_file: str, arguments: list[str]) -> None:
    """Fuzz a target in this process, which ends with it."""
    atheris = importlib.import_module("atheris")
    with atheris.instrument_imports(include=[PACKAGE]):
        run: Callable[[bytes], bool] = importlib.import_module("fuzz.targets").TARGETS[target]
    logging.disable(logging.CRITICAL)
    with open(counts_file, "r+b") as file:
        counts = mmap.mmap(file.fileno(), COUNTS.size)
    executions = accepted = 0

    def one(data: bytes) -> None:
        nonlocal executions, accepted
        if executions == 1000:  # libFuzzer and the interpreter have what they need
            limit_memory()
        executions += 1
        accepted += run(data)
        COUNTS.pack_into(counts, 0, executions, accepted)

    # To merge, libFuzzer starts the program again, by a shell that splits this into words.
    atheris.Setup([" ".join([sys.executable, *sys.argv[:4]]), *arguments], one)
    atheris.Fuzz()


def dictionary(folder: Path) -> list[str]:
    """The option that tells libFuzzer the words of names."""
    words = importlib.import_module("fuzz.names").WORDS
    path = folder / "words"
    with path.open("w") as file:
        for word in words:
            text = "".join(f"\\x{byte:02x}" for byte in word.encode("utf-8", "surrogateescape"))
            file.write(f'"{text}"\n')
    return [f"-dict={path}"]


def fuzz(target: str, options: argparse.Namespace, folder: Path) -> Result:
    """Fuzz a target in another process."""
    targets, corpus = importlib.import_module("fuzz.targets"), importlib.import_module("fuzz.corpus")
    inputs = folder / target
    inputs.mkdir()
    for number, data in enumerate([*corpus.load(target), *targets.seeds(target, options.seed)]):
        (inputs / f"{number}").write_bytes(data)
    for name, data in corpus.regressions(target).items():
        (inputs / name).write_bytes(data)
    arguments = [f"-runs={options.runs}", f"-max_total_time={options.seconds}", f"-timeout={options.timeout}"]
    arguments += [f"-max_len={targets.MAX_LENGTH[target]}", f"-artifact_prefix={options.output}/{target}-"]
    arguments += [f"-seed={options.seed}", "-rss_limit_mb=2048", "-len_control=0", "-reload=0"]
    if target == "formats":
        arguments += dictionary(folder)
    result = _child(target, [*arguments, str(inputs)], folder)
    if options.store and not result.failures:
        merged = folder / f"{target}.merged"
        merged.mkdir()
        _child(target, ["-merge=1", f"-timeout={options.timeout}", str(merged), str(inputs)], folder)
        contents = [path.read_bytes() for path in merged.iterdir()]
        size = corpus.store(target, contents)
        print(f"{target}: {len(contents)} inputs stored, {size} bytes", flush=True)
    return result


def _child(target: str, arguments: list[str], folder: Path) -> Result:
    counts_file = folder / f"{target}.counts"
    counts_file.write_bytes(bytes(COUNTS.size))
    result = Result(target)
    command = [sys.executable, __file__, "--work", target, str(counts_file), *arguments]
    start = time.monotonic()
    last: list[str] = []
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace"
    ) as process:
        assert process.stdout is not None
        for line in process.stdout:
            last = [*last[-60:], line]
            if found := re.search(r"cov: (\d+) ft: (\d+) corp: (\d+)", line):
                result.edges, result.features, result.inputs = map(int, found.groups())
            if found := re.search(r"Test unit written to (\S+)", line):
                result.failures.append(found[1])
    result.seconds = time.monotonic() - start
    result.executions, result.accepted = COUNTS.unpack(counts_file.read_bytes())
    if process.returncode and not result.failures:
        result.failures.append(f"exit code {process.returncode}")
    if result.failures:
        sys.stdout.writelines(last)
    return result


def table(results: list[Result]) -> str:
    """The results for a person."""
    lines = ["target      executions    accepted   per s  edges  features  inputs  result"]
    for r in results:
        rate = r.executions / r.seconds if r.seconds else 0
        numbers = f"{r.executions:>12}{r.accepted:>12}{rate:>8.0f}{r.edges:>7}{r.features:>10}{r.inputs:>8}"
        lines.append(f"{r.target:<10}{numbers}  {', '.join(r.failures) or 'ok'}")
    lines.append(f"{'total':<10}{sum(r.executions for r in results):>12}{sum(r.accepted for r in results):>12}")
    return "\n".join(lines)


def main() -> int:
    """The command."""
    sys.path.insert(0, str(HERE.parent))
    if sys.argv[1:2] == ["--work"]:
        sys.path.insert(1, str(HERE.parent.parent))
        work(sys.argv[2], sys.argv[3], sys.argv[4:])
        return 0
    targets = importlib.import_module("fuzz.targets")
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--target", default="all", help=f"one of {', '.join(targets.TARGETS)}, parsers, all")
    parser.add_argument("--runs", type=int, default=100_000, help="executions of each target")
    parser.add_argument("--seconds", type=int, default=0, help="at most so long for each target; 0: no limit")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--timeout", type=int, default=30, help="seconds that an input may take")
    parser.add_argument("--output", type=Path, default=Path("."), help="folder for inputs that fail")
    parser.add_argument("--store", action="store_true", help="replace the stored corpus by what was found")
    options = parser.parse_args()
    chosen = {"all": list(targets.TARGETS), "parsers": list(targets.PARSERS)}.get(options.target, [options.target])
    if not set(chosen) <= set(targets.TARGETS):
        parser.error(f"no target {options.target}")
    options.output.mkdir(parents=True, exist_ok=True)
    folder = Path(tempfile.mkdtemp(prefix="fuzz"))
    try:
        results = [fuzz(target, options, folder) for target in chosen]
    finally:
        shutil.rmtree(folder)
    print(table(results))
    return int(any(result.failures for result in results))


if __name__ == "__main__":
    sys.exit(main())
