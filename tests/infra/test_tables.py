"""Tables of text."""

from infra.tables import comma_separated, markdown, mean_spread, plain, spreads


def test_mean_and_spread() -> None:
    assert mean_spread([1.0]) == "1.0" and mean_spread([1.0, 3.0]) == "2.0 ± 1.4"
    assert mean_spread([]) == "–" and mean_spread([0.25], digits=2) == "0.25"


def test_each_figure_is_spread_over_the_runs_that_have_it() -> None:
    runs = [{"mIoU": 0.01, "Dist": 5.0}, {"mIoU": 0.03}]
    assert spreads(runs, {"mIoU": 100, "Dist": 1, "FID": 1}) == ["2.0 ± 1.4", "5.0", "–"]


def test_columns_are_aligned() -> None:
    assert plain(("", "mIoU"), [("CUT", "21.5"), ("SRUNIT", "3")]) == "        mIoU\nCUT     21.5\nSRUNIT     3"
    assert markdown(("", "mIoU"), [("CUT", "21.5")]) == "|  | mIoU |\n| --- | --- |\n| CUT | 21.5 |"


def test_csv_quotes_what_holds_a_comma() -> None:
    assert comma_separated(("method", "mIoU"), [("SRUNIT, beta 0", 0.5)]) == 'method,mIoU\n"SRUNIT, beta 0",0.5\n'
