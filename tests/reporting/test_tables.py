import pytest

from flex_jax.reporting.tables import human_bytes, human_count, plan_table, summary_table
from flex_jax.results import summarise


@pytest.mark.parametrize(
    "count, text",
    [
        (0, "0 B"),
        (999, "999 B"),
        (1023, "0.999 KiB"),
        (1536, "1.5 KiB"),
        (3 * 2**20, "3 MiB"),
        (26.66 * 2**30, "26.7 GiB"),
    ],
)
def test_bytes_in_three_digits(count, text):
    assert human_bytes(count) == text


@pytest.mark.parametrize("count, text", [(0, "0"), (512, "512"), (999_700, "1M"), (14_316_000_000, "14.3B")])
def test_counts_in_three_digits(count, text):
    assert human_count(count) == text


def test_summary_is_sorted_by_rouge_l_and_aligned(fake):
    results, _ = fake()
    header, rule, *lines = summary_table(results).splitlines()
    means = {row["method"]: row["mean"] for row in results["summary"] if row["metric"] == "rougeL"}
    assert [line.split()[0] for line in lines] == sorted(means, key=means.get, reverse=True)
    assert f"{means['flex']:.2f} +- " in lines[0]
    assert all(cell in lines[0] for cell in ("  3 MiB  ", "  6 MiB  ", "786K", "3.15M")) and lines[0].endswith("0.6")
    assert len({len(line) for line in (header, rule, *lines)}) == 1


def test_one_seed_shows_no_spread_and_a_missing_score_goes_last(fake):
    results, _ = fake(methods=("fedavg", "flex"), seeds=(0,))
    results["runs"][0]["average"]["rougeL"] = float("nan")
    results["runs"][0]["timing"]["round_s_median"] = None
    results["summary"] = summarise(results["runs"])
    *_, flex, fedavg = summary_table(results).splitlines()
    assert flex.startswith("flex") and "+-" not in flex
    assert fedavg.split()[:3] == ["fedavg", "1", "-"] and fedavg.endswith("-")


def test_plan_shows_every_cost():
    plan = {
        "method": "flex",
        "frozen": 14_316_000_000,
        "shared": 786_432,
        "personal_per_client": 3_148_288,
        "frozen_bytes": 26 * 2**30,
        "client_bytes": 60 * 2**20,
        "activation_bytes": 3 * 2**30,
        "peak_bytes": 30 * 2**30,
        "upload_bytes": 3 * 2**20,
        "download_bytes": 6 * 2**20,
        "clients": 10,
        "cohort": 4,
    }
    groups, header, rule, line, other = plan_table([plan, {**plan, "method": "a_long_name", "cohort": 10}]).splitlines()
    assert line.split("  ")[0] == "flex"
    for cost in (
        "4 of 10",
        "14.3B",
        "786K",
        "3.15M",
        "3 MiB",
        "6 MiB",
        "60 MiB",
        "26 GiB",
        "4 x 60 MiB",
        "3 GiB",
        "30 GiB",
    ):
        assert f" {cost}" in line
    assert len(header) == len(rule) == len(line) == len(other) >= len(groups)
    assert groups.index("memory of a device") > header.index("client  ")
