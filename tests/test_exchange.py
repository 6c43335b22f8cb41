"""An explanation for other libraries: the same numbers under their names."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from test_explanation import LABELS, explanation  # noqa: F401 - the fixture

from shapadapter.core.errors import ClassNotFoundError


def test_arrays_are_copies_of_the_tensors(explanation):  # noqa: F811
    arrays = explanation.to_numpy()
    assert arrays.keys() == {"attributions", "classes", "logits", "null_values", "probabilities", "images"}
    assert np.array_equal(arrays["attributions"], explanation.attributions.numpy())
    arrays["attributions"][:] = 0
    assert explanation.attributions.abs().sum() > 0
    refined = replace(explanation, standard_errors=torch.ones_like(explanation.attributions))
    assert refined.to_numpy()["standard_errors"].shape == (2, 2, 3, 2)


def test_arrays_are_saved_and_read_by_numpy_without_pickle(explanation, tmp_path):  # noqa: F811
    np.savez(tmp_path / "why.npz", **explanation.to_numpy())
    with np.load(tmp_path / "why.npz", allow_pickle=False) as found:
        assert np.array_equal(found["logits"], explanation.logits.numpy())


def test_json_has_the_numbers_of_the_shown_classes_best_first(explanation):  # noqa: F811
    found = json.loads(json.dumps(explanation.to_dict(), allow_nan=False))
    assert found["players"] == [2, 3]
    assert found["sums_to_logits"] is True
    for index, image in enumerate(found["images"]):
        assert image["prediction"] == explanation.top(1)[index][0].label
        logits = [entry["logit"] for entry in image["classes"]]
        assert logits == sorted(logits, reverse=True)
        for entry in image["classes"]:
            assert entry["label"] == LABELS[entry["index"]]
            assert entry["null_value"] + entry["sum"] == pytest.approx(entry["logit"], abs=1e-5)
            column = explanation.classes[index].tolist().index(entry["index"])
            assert entry["attributions"] == explanation.attributions[index, :, :, column].tolist()
            assert "standard_errors" not in entry


def test_json_knows_no_nan(explanation):  # noqa: F811
    errors = torch.full_like(explanation.attributions, torch.nan)
    quantities = replace(
        explanation, standard_errors=errors, probabilities=torch.full_like(explanation.probabilities, torch.nan)
    )
    entry = json.loads(json.dumps(quantities.to_dict(), allow_nan=False))["images"][0]["classes"][0]
    assert entry["probability"] is None
    assert entry["standard_errors"] == [[None] * 3] * 2


class TestShap:
    @pytest.fixture(autouse=True)
    def _needs_shap(self):
        pytest.importorskip("shap")
        import matplotlib

        matplotlib.use("Agg")

    def test_image_plot_shows_every_map_with_its_title(self, explanation):  # noqa: F811
        import matplotlib.pyplot as plt
        import shap

        shap.plots.image(explanation.to_shap(), show=False)
        axes = plt.gcf().axes[:-1]  # without the colour bar
        assert [axis.get_title() for axis in axes] == ["", "seven", "one", "", "seven", "eight"]
        for axis, (image, column) in zip([axes[1], axes[5]], [(0, 0), (1, 1)], strict=True):
            drawn = np.asarray(axis.images[-1].get_array())
            assert np.array_equal(drawn, explanation.attributions[image, :, :, column].numpy())
        shap.plots.image(explanation.to_shap()[0], show=False)
        assert [axis.get_title() for axis in plt.gcf().axes[:-1]] == ["", "seven", "one"]
        plt.close("all")

    def test_a_class_has_named_players_that_sum_to_the_logit(self, explanation):  # noqa: F811
        import matplotlib.pyplot as plt
        import shap

        found = explanation.to_shap("seven")
        assert found.values.shape == found.data.shape == (2, 6)
        assert found.feature_names[4] == "row 2, column 2"
        assert np.allclose(found.base_values + found.values.sum(1), explanation.logits[:, 3], atol=1e-5)
        tile = explanation.images[0, 3:6, 3:6].float().mean() / 255
        assert found.data[0, 4] == pytest.approx(float(tile), abs=1e-6)
        for plot in (shap.plots.bar, shap.plots.beeswarm, lambda *a, **k: shap.plots.waterfall(a[0][0], **k)):
            plot(found, show=False)
        plt.close("all")

    def test_standard_errors_come_along(self, explanation):  # noqa: F811
        errors = torch.rand_like(explanation.attributions)
        found = replace(explanation, standard_errors=errors).to_shap("seven")
        assert np.array_equal(found.error_std, errors[..., 0].flatten(1).numpy())

    def test_a_class_that_is_not_there(self, explanation):  # noqa: F811
        with pytest.raises(ClassNotFoundError, match="seven"):
            explanation.to_shap("sevn")
        with pytest.raises(ValueError, match="not among the columns"):
            explanation.to_shap("one")


def test_without_the_shap_library_one_line_says_what_to_install(explanation, monkeypatch):  # noqa: F811
    monkeypatch.setitem(__import__("sys").modules, "shap", None)
    with pytest.raises(ImportError, match="pip install shap"):
        explanation.to_shap()
