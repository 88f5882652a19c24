"""The tables of docs/ablations.md as Markdown, from bench/results/ablations.json."""

from typing import Any


def print_tables(found: dict[str, Any]) -> None:
    print(f"Two sets of {found['problems']} problems, two samples each at T = 1")
    for name, regime in found["regimes"].items():
        base = "; ".join(
            f"{percent(share)} on {which} ({', '.join(f'{100 * one:.0f}' for one in regime['starts'][which])})"
            for which, share in regime["base"].items()
        )
        teacher = ", ".join(f"{percent(share)} at T = {t}" for t, share in regime["teacher"].items())
        print(f"\n## {name}: {regime['about']}\n")
        print(f"{regime['seeds']} seeds, {regime['rows']} rows a stage; commit {regime['commit']}. "
              f"Students before, by seed: {base}. The teacher's candidates right: {teacher}.\n")  # fmt: skip
        _claims(regime["claims"])
        for family in regime["families"].values():
            _family(family)
        if regime["sweep"]:
            _sweep(regime["sweep"])


def _claims(claims: list[dict[str, Any]]) -> None:
    table("claim", "published", "A", "B", "verdict")
    for claim in claims:
        verdict = claim["verdict"] + ("; also on B" if claim["also_on_B"] else "")
        row(claim["said"], claim["published"], *(difference(one) for one in claim["sets"].values()), f"**{verdict}**")


def _family(family: dict[str, Any]) -> None:
    reference = family["reference"]
    print(f"\n### {family['title']}\n")
    table("arm", "tokens", *(f"{name}: pass@1 | {name}: above {reference}" for name in family["sets"]), columns=6)
    row("*before any*", "0", *(f"{percent(measured['base'])} | " for measured in family["sets"].values()))
    for arm in family["arms"]:
        cells = []
        for measured in family["sets"].values():
            pair = next((pair for pair in measured["pairs"] if pair["b"] == arm), None)
            cells += [percent(measured["pass_at_1"][arm]), difference(pair) if pair else ""]
        row(arm, f"{measured['tokens'][arm]:,.0f}", *cells)


def _sweep(rows: list[dict[str, Any]]) -> None:
    print("\n### Where a sign turns: students after more or less first training\n")
    arms = list(rows[0]["above_random"])
    table("steps", "set", "before", "random, T = 0.6", *(f"{arm} above it" for arm in arms))
    for r in rows:
        row(f"{r['step']:,}", r["set"], percent(r["base"]), percent(r["random"]),
            *(difference(r["above_random"][arm]) for arm in arms))  # fmt: skip


def table(*heads: str, columns: int = 0) -> None:
    row(*heads)
    print("|" + "---|" * (columns or len(heads)))


def row(*cells: str) -> None:
    print("| " + " | ".join(cells) + " |")


def percent(share: float) -> str:
    return f"{100 * share:.1f} %"


def difference(one: dict[str, Any]) -> str:
    low, high = one["interval"]
    return f"{100 * one['difference']:+.1f} ({100 * low:+.1f} … {100 * high:+.1f})"
