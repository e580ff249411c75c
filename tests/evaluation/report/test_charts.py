import math

import matplotlib
import numpy as np
import pytest
import torch
from matplotlib import pyplot
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from PIL import Image

from gnnet.evaluation.report import charts, pictures, style
from gnnet.models.pyramid import FeaturePyramid

VERMILLION = (213, 94, 0)
SKY = (86, 180, 233)


@pytest.fixture(autouse=True)
def _global_state_is_left_alone():
    settings = dict(matplotlib.rcParams)
    yield
    assert pyplot.get_fignums() == []
    assert dict(matplotlib.rcParams) == settings


def picture(height: int = 60, width: int = 80) -> torch.Tensor:
    """(3, height, width) uint8: smooth colours and a bright square."""
    y, x = torch.meshgrid(torch.linspace(0, 1, height), torch.linspace(0, 1, width), indexing="ij")
    image = torch.stack([x, y, 1 - x])
    image[:, height // 4 : height // 2, width // 4 : width // 2] = 1
    return (image * 255).to(torch.uint8)


def points(count: int, seed: int = 0) -> torch.Tensor:
    return torch.rand(count, 2, generator=torch.Generator().manual_seed(seed)) * torch.tensor([80.0, 60.0])


def feature_map(stride: int, channels: int = 8, height: int = 60, width: int = 80) -> torch.Tensor:
    shape = (channels, math.ceil(height / stride), math.ceil(width / stride))
    return torch.randn(shape, generator=torch.Generator().manual_seed(stride))


def decoded(path, figure: Figure) -> np.ndarray:
    """Pixels (H, W, 3) of a figure with its margins; its PNG is small enough and not larger than the figure."""
    assert path.stat().st_size <= style.MAX_BYTES
    with Image.open(path) as image:
        assert image.format == "PNG"
        assert (np.array(image.size) <= figure.get_size_inches() * figure.dpi + 10).all()
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    return np.asarray(canvas.buffer_rgba())[..., :3].astype(int)


def close_to(pixel: np.ndarray, colour: tuple[int, int, int]) -> bool:
    return bool((np.abs(pixel - np.array(colour)) <= 12).all())


def test_loss_curves_of_a_csv_with_empty_cells(tmp_path):
    rows = ["epoch,step,train/loss,validation/loss,validation/recall"]
    for step in range(0, 100, 10):
        rows.append(f"0,{step},{2 + step / 10},,")
        if step % 50 == 0:
            rows.append(f"0,{step},,{3 + step},0.5")
    (tmp_path / "metrics.csv").write_text("\n".join([*rows, "1,100,nan,,", "1,110,,inf,"]))
    figure = charts.loss_curves(tmp_path / "metrics.csv", path=tmp_path / "loss.png")
    decoded(tmp_path / "loss.png", figure)
    (axes,) = figure.axes
    curves = {line.get_label(): line.get_xydata().tolist() for line in axes.lines}
    assert curves == {
        "train": [[s, 2 + s / 10] for s in range(0, 100, 10)],
        "validation": [[0, 3], [50, 53]],
    }
    assert axes.get_ylabel() == "loss" and axes.get_xlabel() == "training step"
    assert axes.get_yscale() == "log"


def test_loss_curves_smooths_long_training_series_and_groups_quantities(tmp_path):
    rows = ["step,train/loss_step,val_loss,train/loss_gn"]
    rows += [f"{step},{1 if step % 2 == 0 else 3},," for step in range(200)]
    rows += ["0,,2.0,-1", "100,,1.5,", "1,,,1"]
    (tmp_path / "metrics.csv").write_text("\n".join(rows))
    figure = charts.loss_curves(tmp_path / "metrics.csv")
    assert [axes.get_ylabel() for axes in figure.axes] == ["loss_gn", "loss"]
    lines = {line.get_label(): line for line in figure.axes[1].lines}
    assert np.abs(lines["train (mean of 8)"].get_ydata()[4:-4] - 2).max() < 1e-9
    assert lines["validation"].get_color() != lines["train (mean of 8)"].get_color()
    assert figure.axes[0].get_yscale() == "linear"


def test_loss_curves_says_what_is_missing(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"metrics\.csv does not exist"):
        charts.loss_curves(tmp_path / "metrics.csv")
    (tmp_path / "metrics.csv").write_text("epoch,loss\n0,1\n")
    with pytest.raises(ValueError, match="columns epoch, loss; expected step"):
        charts.loss_curves(tmp_path / "metrics.csv")
    (tmp_path / "metrics.csv").write_text("step,loss\n0,one\n")
    with pytest.raises(ValueError, match="column loss holds a cell that is not a number"):
        charts.loss_curves(tmp_path / "metrics.csv")
    (tmp_path / "metrics.csv").write_text("step,loss,recall\n0,nan,1\n")
    with pytest.raises(ValueError, match="no finite value in a column with 'loss' in its name; found loss, recall"):
        charts.loss_curves(tmp_path / "metrics.csv")


def test_matches_are_drawn_between_the_images(tmp_path):
    image_b = picture(30, 40)  # drawn at twice its size, as high as image a
    path = tmp_path / "m.png"
    figure = pictures.matches(
        picture().float() / 255, image_b, points(300), points(300) / 2,
        errors=torch.cat([torch.zeros(150), torch.full((150,), torch.inf)]), path=path,
    )  # fmt: skip
    decoded(path, figure)
    axes = figure.axes[0]
    assert axes.get_title() == "300 matches, median error ∞ px, 50% within 3 px (100 drawn)"
    segments = np.array(axes.collections[0].get_segments())
    shift = segments[:, 1] - segments[:, 0]
    assert segments.shape == (100, 2, 2)
    np.testing.assert_allclose(shift, np.broadcast_to([80 * 1.02, 0], shift.shape), atol=1e-4)


def test_matches_may_be_none(tmp_path):
    empty = torch.zeros(0, 2)
    figure = pictures.matches(picture(), picture(), empty, empty, errors=[], path=tmp_path / "m.png")
    decoded(tmp_path / "m.png", figure)
    assert figure.axes[0].get_title() == "0 matches"


def test_before_after_marks_pixels_in_colmaps_convention(tmp_path):
    """A mark at (x, y) covers the picture there, (0, 0) being its corner."""
    image = torch.zeros(3, 100, 100, dtype=torch.uint8)
    truth = torch.tensor([[50.0, 50.0]])
    figure = pictures.before_after(
        image, xy_truth=truth, xy_before=truth + torch.tensor([30.0, -20.0]), xy_after=truth,
        before="0.52 m, 4.1°", path=tmp_path / "b.png",
    )  # fmt: skip
    pixels = decoded(tmp_path / "b.png", figure)
    left, right = (axes.bbox for axes in figure.axes)

    def pixel(box, x: float, y: float) -> np.ndarray:
        return pixels[int(pixels.shape[0] - box.y1 + y * box.height / 100), int(box.x0 + x * box.width / 100)]

    assert close_to(pixel(left, 80, 30), VERMILLION)
    assert close_to(pixel(left, 65, 40), VERMILLION)  # the line to the truth
    assert close_to(pixel(right, 50, 50), SKY)
    assert close_to(pixel(left, 20, 80), (0, 0, 0)) and close_to(pixel(right, 80, 30), (0, 0, 0))
    assert [axes.get_title() for axes in figure.axes] == [
        "initial pose: 0.52 m, 4.1° (median 36.1 px)", "refined pose: median 0.00 px",
    ]  # fmt: skip


def test_before_after_leaves_out_points_that_do_not_project(tmp_path):
    lost = torch.full((4, 2), torch.nan)
    figure = pictures.before_after(
        picture(), xy_truth=points(4), xy_before=points(4), xy_after=lost, after="failed", path=tmp_path / "b.png"
    )
    decoded(tmp_path / "b.png", figure)
    assert figure.axes[1].get_title() == "refined pose: failed (no point)"


def test_convergence_basin_shows_shares_and_counts(tmp_path):
    path = tmp_path / "c.png"
    shares = {"trained": [1.0, 0.8, 0.3], "untrained": [0.7, 0.1, math.nan]}
    figure = charts.convergence_basin([0, 0.1, 0.2, 0.6], shares, torch.tensor([40, 40, 0]), path=path)
    decoded(path, figure)
    (axes,) = figure.axes
    trained = next(line for line in axes.lines if line.get_label() == "trained")
    np.testing.assert_allclose(trained.get_xdata(), [0.05, 0.15, 0.4])
    np.testing.assert_allclose(trained.get_ydata(), [100, 80, np.nan])  # no initial pose lies in the last ring
    assert [text.get_text() for text in axes.texts] == ["n=40", "n=40", "n=0"]
    assert axes.get_xlabel() == "initial offset [m]"
    equal = charts.convergence_basin([0, 8, 16], {"gn": [1, 0.5]}, [20, 20])
    assert equal.axes[0].get_xlabel() == "initial offset [m], 20 initial poses a ring"


def test_bands_of_the_basin_are_wilson_intervals():
    figure = charts.convergence_basin([0, 1, 2, 3], {"gn": [0.5, 1.0, 0.0]}, [10, 40, 7])
    edge = figure.axes[0].collections[0].get_paths()[0].vertices
    for centre, share, n in ((0.5, 0.5, 10), (1.5, 1.0, 40), (2.5, 0.0, 7)):
        found = edge[np.isclose(edge[:, 0], centre), 1]
        z = 1.96  # Wilson, 1927
        middle, half = share + z**2 / (2 * n), z * np.sqrt(share * (1 - share) / n + (z / (2 * n)) ** 2)
        expected = 100 * np.array([middle - half, middle + half]) / (1 + z**2 / n)
        np.testing.assert_allclose([found.min(), found.max()], expected, atol=0.01)


@pytest.mark.parametrize("levels", [1, 2, 4])
def test_feature_maps_stand_beside_the_image(tmp_path, levels):
    strides = (8, 4, 2, 1)[:levels]
    pyramid = FeaturePyramid(tuple(feature_map(s)[None].bfloat16() for s in strides), strides)
    figure = pictures.feature_maps(picture(), pyramid, path=tmp_path / "f.png")
    decoded(tmp_path / "f.png", figure)
    assert [axes.get_title() for axes in figure.axes] == [
        "image, 80 × 60", *(f"features at 1/{s}, 8 channels" for s in strides),
    ]  # fmt: skip


def test_features_lie_where_their_cells_are(tmp_path):
    """One cell that differs is drawn at its place in the image, also in a map that reaches beyond it."""
    features = torch.zeros(1, 1, 8, 10)
    features[0, 0, 2, 7] = 1  # pixels 56 to 64 by 16 to 24 of an image of 76 × 60
    figure = pictures.feature_maps(picture(60, 76), FeaturePyramid((features,), (8,)), path=tmp_path / "f.png")
    pixels = decoded(tmp_path / "f.png", figure)
    box = figure.axes[1].bbox
    top = pixels.shape[0] - round(box.y1)
    panel = pixels[top : top + round(box.height), round(box.x0) : round(box.x1)].mean(-1)
    rows, columns = np.nonzero(panel[2:-2, 2:-2] > 200)  # without the white around it
    rows, columns = rows + 2, columns + 2
    scale = box.width / 76
    np.testing.assert_allclose([columns.min(), columns.max() + 1], [56 * scale, 64 * scale], atol=1.5)
    np.testing.assert_allclose([rows.min(), rows.max() + 1], [16 * scale, 24 * scale], atol=1.5)


def test_one_colour_is_one_feature_in_all_maps():
    first, second = feature_map(4), feature_map(8)
    second[:, 2, 3] = first[:, 5, 6]
    colours = pictures.pca_colours([first, second])
    np.testing.assert_allclose(colours[1][2, 3], colours[0][5, 6], atol=1e-6)
    assert colours[0].shape == (15, 20, 3)
    assert all(c.min() >= 0 and c.max() <= 1 for c in colours)


def test_pca_colours_show_the_strongest_components_first():
    basis = torch.linalg.qr(torch.randn(16, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64))[0]
    parts = torch.randn(4, 20, 30, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    parts *= torch.tensor([10.0, 5.0, 2.0, 0.01])[:, None, None]
    colours = pictures.pca_colours([torch.einsum("ck,khw->chw", basis, parts)])[0]
    for k in range(3):
        inside = (colours[..., k] > 0) & (colours[..., k] < 1)
        correlation = np.corrcoef(colours[..., k][inside], parts[k].numpy()[inside])[0, 1]
        assert abs(correlation) > 0.98


def test_pca_colours_of_few_channels_and_constant_maps():
    grey = pictures.pca_colours([feature_map(4, channels=1)])[0]
    assert (grey[..., :1] == grey).all() and grey.max() == 1
    assert pictures.pca_colours([feature_map(4, channels=2)])[0].shape == (15, 20, 3)
    assert np.isfinite(pictures.pca_colours([torch.ones(5, 4, 4)])[0]).all()


def test_overview_has_a_row_for_each_condition(tmp_path):
    truth = points(30)
    rows = [
        pictures.OverviewRow("night", picture(), feature_map(4), 4, truth, truth + 9, truth, "52 cm, 4°", "4 mm, 0.1°"),
        pictures.OverviewRow("snow", picture(80, 80), feature_map(4, height=80), 4, truth, truth + 9, truth),
    ]
    figure = pictures.overview(rows, path=tmp_path / "o.png")
    decoded(tmp_path / "o.png", figure)
    assert len(figure.axes) == 8
    assert [axes.get_title() for axes in figure.axes[:4]] == ["image", "features", "initial pose", "refined pose"]
    assert [axes.get_ylabel() for axes in figure.axes[::4]] == ["night", "snow"]
    texts = [text.get_text() for axes in figure.axes for text in axes.texts if text.get_text()]
    assert texts == ["52 cm, 4°", "4 mm, 0.1°"]


@pytest.mark.slow
def test_pictures_of_noise_stay_small(tmp_path):
    generator = torch.Generator().manual_seed(0)
    noise = torch.randint(0, 256, (3, 512, 512), generator=generator, dtype=torch.uint8)
    path = tmp_path / "deep" / "noise.png"
    pictures.matches(noise, noise.flip(1), points(5), points(5), errors=[0, 0, 0, 20, 20], path=path)
    assert path.stat().st_size <= style.MAX_BYTES
    with Image.open(path) as image:
        pixels = np.asarray(image.convert("RGB")).astype(int)
    assert (pixels[-1, -1] >= 250).all()  # white stays white
    for colour in (VERMILLION, SKY):
        assert (np.abs(pixels - np.array(colour)) <= 24).all(-1).any()


def test_every_mark_is_named_below_the_pictures():
    truth = points(4)
    figure = pictures.before_after(picture(), xy_truth=truth, xy_before=truth + 3, xy_after=truth)
    (legend,) = figure.legends
    assert [text.get_text() for text in legend.get_texts()] == [
        "at the true pose", "at the initial pose", "at the refined pose",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("message", "draw"),
    [
        (r"image_b has shape \(60, 80, 3\)",
         lambda: pictures.matches(picture(), picture().permute(1, 2, 0), points(3), points(3), errors=[0] * 3)),
        ("image_a has values from 0 to 255",
         lambda: pictures.matches(picture().float(), picture(), points(3), points(3), errors=[0] * 3)),
        (r"keypoints_a has shape \(3,\); expected \(N, 2\)",
         lambda: pictures.matches(picture(), picture(), torch.zeros(3), points(3), errors=[0] * 3)),
        (r"keypoints_b has shape \(4, 2\); expected \(3, 2\)",
         lambda: pictures.matches(picture(), picture(), points(3), points(4), errors=[0] * 3)),
        (r"errors has shape \(2,\); expected \(3,\)",
         lambda: pictures.matches(picture(), picture(), points(3), points(3), errors=[1, 2])),
        (r"xy_after has shape \(2, 2\)",
         lambda: pictures.before_after(picture(), xy_truth=points(3), xy_before=points(3), xy_after=points(2))),
        (r"converged\['gn'\] has shape \(1,\); expected \(2,\)",
         lambda: charts.convergence_basin([0, 1, 2], {"gn": [1]}, [5, 5])),
        ("expected shares in 0 to 1",
         lambda: charts.convergence_basin([0, 1, 2], {"gn": [100, 50]}, [5, 5])),
        ("expected two or more rising offsets",
         lambda: charts.convergence_basin([0, 1, 1], {"gn": [1, 0]}, [5, 5])),
        (r"shape \(1, 8, 15, 20\); expected \(C, h, w\)",
         lambda: pictures.pca_colours([feature_map(4)[None]])),
        ("not finite", lambda: pictures.pca_colours([torch.full((3, 4, 4), torch.nan)])),
        ("overview has no rows", lambda: pictures.overview([])),
        (r"xy_truth of night has shape \(3,\)",
         lambda: pictures.overview(
             [pictures.OverviewRow("night", picture(), feature_map(4), 4, torch.zeros(3), points(3), points(3))]
         )),
    ],
)  # fmt: skip
def test_bad_input_is_named(message, draw):
    with pytest.raises(ValueError, match=message):
        draw()
