"""Reports, plots and comparisons: their data, without a browser."""

import pandas
import pytest

from utils_report import plot_sweep


def points(**columns) -> pandas.DataFrame:
    return pandas.DataFrame(columns)


def drawn(path) -> str:
    return path.read_text(encoding="utf-8")


class TestPlotSweep:
    def test_one_axis_gives_both_pictures(self, tmp_path):
        table = points(aa=[0.4, 0.0, 0.2], mAP=[20.0, 10.0, 30.0])
        png, svg = plot_sweep(tmp_path / "plots" / "aa0.1", table, ["aa"])
        assert png == tmp_path / "plots" / "aa0.1.png"
        assert png.read_bytes().startswith(b"\x89PNG")
        assert "<!-- best: mAP 30.00 at aa = 0.2 -->" in drawn(svg)

    def test_a_sweep_of_the_fusion_weight_marks_its_two_ends(self, tmp_path):
        table = points(fusion_weight=[0.0, 0.5, 1.0], mAP=[12.0, 25.0, 17.0])
        svg = drawn(plot_sweep(tmp_path / "sweep", table, ["fusion_weight"])[1])
        assert "<!-- fusion_weight = 0: 12.00 -->" in svg
        assert "<!-- fusion_weight = 1: 17.00 -->" in svg
        named = {"image only": 12.0, "text only": 17.0}
        svg = drawn(plot_sweep(tmp_path / "sweep", table, ["fusion_weight"], named)[1])
        assert "<!-- image only: 12.00 -->" in svg
        assert "fusion_weight = 0:" not in svg

    def test_words_keep_their_order(self, tmp_path):
        table = points(ties=["row", "best", "worst"], mAP=[2.0, 3.0, 1.0])
        svg = drawn(plot_sweep(tmp_path / "sweep", table, ["ties"])[1])
        assert svg.index("<!-- row -->") < svg.index("<!-- best -->") < svg.index("<!-- worst -->")
        assert "<!-- best: mAP 3.00 at ties = best -->" in svg

    def test_two_axes_give_a_heat_map_with_holes_where_no_point_is(self, tmp_path):
        table = points(aa=[0.2, 0.0, 0.2], k=[50, 250, 250], mAP=[31.0, 12.0, 33.5])
        svg = drawn(plot_sweep(tmp_path / "sweep", table, ["aa", "k"])[1])
        assert "<!-- best: mAP 33.50 at aa = 0.2, k = 250 -->" in svg
        assert "<!-- 31.0 -->" in svg
        assert "nan" not in svg

    @pytest.mark.parametrize("axes", [[], ["a", "b", "c"]])
    def test_other_numbers_of_axes_are_refused(self, tmp_path, axes):
        with pytest.raises(ValueError, match="one or two axes"):
            plot_sweep(tmp_path / "sweep", points(a=[1], b=[1], c=[1], mAP=[1.0]), axes)
        assert not list(tmp_path.iterdir())
