"""Report sections on training runs, ablations and profiles."""

from collections import defaultdict
from collections.abc import Sequence

from benchmarks.reporting.comparison import combined, verdict
from benchmarks.reporting.result_set import OURS, ResultSet, undated
from benchmarks.reporting.text import number, one_line, plus_minus, ratio, table
from benchmarks.results import Conditions, Spread, TrainingRun

ABLATION = f"{OURS} without "


def _training_cell(conditions: Conditions, run: TrainingRun) -> tuple[object, ...]:
    """Key shared by two runs whose times may be compared."""
    return (undated(conditions), run.recipe, run.dtype, run.seq_len, run.tokens_per_update)


def _our_runs(results: ResultSet) -> dict[tuple[object, ...], list[Spread]]:
    ours = defaultdict(list)
    for conditions, run in results.training:
        if run.contender == OURS and run.seconds_per_update and not run.parity:
            ours[_training_cell(conditions, run)].append(run.seconds_per_update)
    return ours


def training_section(results: ResultSet) -> str:
    """One table of contenders per workload, followed by notes on its rows."""
    groups = defaultdict(list)
    for conditions, run in results.training:
        if not run.contender.startswith(ABLATION):
            groups[workload(run)].append((conditions, run))
    if not groups:
        return ""
    ours = _our_runs(results)
    parts = ["## Training"]
    headings = (
        "contender",
        "batch",
        "tok/s",
        "ratio",
        "MFU causal",
        "MFU PaLM",
        "HFU",
        "% of H",
        "peak GB",
        "first update s",
        "loss first → last",
        "MHz",
        "W",
    )
    for name, entries in groups.items():
        entries.sort(key=lambda entry: (bool(entry[1].parity), -(entry[1].tok_per_s or 0)))
        rows = [
            _training_row(run, results.mark(conditions), ours.get(_training_cell(conditions, run)))
            for conditions, run in entries
            if run.seconds_per_update
        ]
        parts.append(f"### {name}")
        if rows:
            parts.append(table(headings, rows, n_text=1))
        notes = [
            f"- {note}" for conditions, run in entries for note in _notes(run, results, conditions)
        ]
        sources = sorted({run.bound_source for _, run in entries if run.bound_tok_per_s})
        notes += [f"- H is computed from rates {source}" for source in sources]
        if notes:
            parts.append("\n".join(notes))
    return "\n\n".join(parts)


def workload(run: TrainingRun) -> str:
    """Recipe, size, dtype, sequence length and tokens per update on one line."""
    return (
        f"{run.recipe}, {run.n_parameters / 1e6:,.0f}M parameters, {run.dtype}, "
        f"sequences of {run.seq_len:,}, {run.tokens_per_update:,} tokens per update"
    )


def _training_row(run: TrainingRun, mark: str, ours: Sequence[Spread] | None) -> tuple[str, ...]:
    seconds = run.seconds_per_update
    assert seconds is not None
    # A void row did not do the same training, so its shares and ratio mean nothing.
    shares = (run.mfu_causal, run.mfu_palm, run.hfu, run.share_of_bound)
    losses = f"{run.losses[0]:.3f} → {run.losses[-1]:.3f}" if run.losses else ""
    return (
        f"**void** ~~{run.contender}~~{mark}" if run.parity else run.contender + mark,
        str(run.batch_size),
        _tok_per_s(run, seconds),
        "" if run.parity else ratio(seconds, ours or []),
        *("" if share is None or run.parity else f"{share:.1%}" for share in shares),
        "" if run.peak_bytes is None else f"{run.peak_bytes / 1e9:.2f}",
        "" if run.seconds_to_first_update is None else f"{run.seconds_to_first_update:.1f}",
        losses,
        "" if run.sm_clock_mhz is None else f"{run.sm_clock_mhz:,.0f}",
        "" if run.power_watts is None else f"{run.power_watts:,.0f}",
    )


def _tok_per_s(run: TrainingRun, seconds: Spread) -> str:
    text = number(run.tokens_per_update / seconds.median) + plus_minus(seconds)
    return f"~~{text}~~" if run.parity else text


def _notes(run: TrainingRun, results: ResultSet, conditions: Conditions) -> list[str]:
    name = run.contender + results.mark(conditions)
    notes = []
    if run.failure:
        notes.append(f"{name} failed: {one_line(run.failure)}")
    if run.parity:
        notes.append(f"**void** {name}: {one_line(run.parity)}")
    if run.details:
        notes.append(f"{name}: {one_line(run.details)}")
    return notes


def ablations_section(results: ResultSet) -> str:
    """Table of ablations, judged by the rule of `comparison.verdict`."""
    runs = [entry for entry in results.training if entry[1].contender.startswith(ABLATION)]
    if not runs:
        return ""
    ours = _our_runs(results)
    rows, notes = [], []
    for conditions, run in runs:
        notes += [f"- {note}" for note in _notes(run, results, conditions)]
        seconds, baseline = run.seconds_per_update, ours.get(_training_cell(conditions, run), [])
        if seconds is None:
            continue
        comparable = baseline and not run.parity
        name = run.contender.removeprefix(ABLATION)
        rows.append(
            (
                f"**void** ~~{name}~~" if run.parity else name + results.mark(conditions),
                workload(run),
                verdict(combined(baseline), seconds) if comparable else "",
                _tok_per_s(run, seconds),
                ratio(seconds, baseline) if comparable else "",
                "" if run.peak_bytes is None else f"{run.peak_bytes / 1e9:.2f}",
            )
        )
    headings = ("without", "workload", f"against {OURS}", "tok/s", "ratio", "peak GB")
    parts = ["## Ablations"]
    if rows:
        parts.append(table(headings, rows, n_text=3))
    if notes:
        parts.append("\n".join(notes))
    return "\n\n".join(parts)


def profile_section(results: ResultSet) -> str:
    """Device time per class of kernels, the largest gap to the bound first."""
    # Shares of two profiles must not be mixed in one table.
    profiles = defaultdict(list)
    for conditions, share in results.profile:
        profiles[share.recipe, conditions].append(share)
    if not profiles:
        return ""
    parts = [
        "## Profile of an update\n\nThe gap is the time above the bound H. A class without a bound "
        "is all gap."
    ]
    headings = ("class", "ms", "share", "calls", "bound ms", "gap ms")
    for (recipe, conditions), shares in profiles.items():
        shares.sort(key=lambda share: (share.bound_s or 0) - share.seconds)
        rows = [
            (
                share.operator_class,
                number(share.seconds * 1e3),
                f"{share.share:.1%}",
                f"{share.calls:,}",
                "" if share.bound_s is None else number(share.bound_s * 1e3),
                number((share.seconds - (share.bound_s or 0)) * 1e3),
            )
            for share in shares
        ]
        parts.append(f"### {recipe}, {conditions.date}{results.mark(conditions)}")
        parts.append(table(headings, rows, n_text=1))
    return "\n\n".join(parts)
