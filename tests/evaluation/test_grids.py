import numpy as np
import pytest

from diffusion_jax.evaluation import grids

Image = pytest.importorskip("PIL.Image")


def constant(values, height=2, width=3, channels=1):
    shape = (1, height, width, channels)
    return np.concatenate([np.full(shape, v, np.float32) for v in values])


def test_plain_grid_has_the_stated_geometry():
    grid = grids.image_grid(constant([-1, 0, 1, -0.5, 0.5]), columns=3, scale=4, pad=2)
    height, width = 2 * 4, 3 * 4
    assert grid.shape == (2 + 2 * (height + 2), 2 + 3 * (width + 2), 3) and grid.dtype == np.uint8
    expected = np.full_like(grid, 255)
    for i, level in enumerate([0, 128, 255, 64, 191]):
        y, x = 2 + (i // 3) * (height + 2), 2 + (i % 3) * (width + 2)
        expected[y : y + height, x : x + width] = level
    np.testing.assert_array_equal(grid, expected)


def test_pixels_become_squares():
    image = np.linspace(-1, 1, 6, dtype=np.float32).reshape(1, 2, 3, 1)
    grid = grids.image_grid(image, scale=5, pad=0)
    levels = np.round(np.linspace(0, 255, 6)).astype(np.uint8).reshape(2, 3)
    np.testing.assert_array_equal(grid[..., 0], np.kron(levels, np.ones((5, 5), np.uint8)))


def test_defaults_show_digits_at_a_visible_size():
    grid = grids.image_grid(np.zeros((10, 8, 8, 1)))
    assert grid.shape == (2 + 3 * 50, 2 + 4 * 50, 3)
    assert grids.image_grid(np.zeros((1, 64, 64, 3))).shape == (68, 68, 3)


def test_captions_move_the_cells_as_stated_and_leave_them_untouched():
    images = constant([-1, 0, 1, -1], height=8, width=8)
    options = {"columns": 2, "scale": 6, "pad": 3}
    bare = grids.image_grid(images, **options)
    grid = grids.image_grid(
        images,
        **options,
        labels=[3, 1, 4, 1],
        row_labels=["a", "b"],
        column_labels=["left", "right"],
        title="four",
    )
    strip = grids.CAPTION_HEIGHT
    left = grid.shape[1] - bare.shape[1]
    assert left > 2 * 3
    assert grid.shape[0] == 2 * strip + 3 + 2 * (48 + strip + 3)
    for i, level in enumerate([0, 128, 255, 0]):
        y, x = 2 * strip + 3 + (i // 2) * (48 + strip + 3), left + 3 + (i % 2) * 51
        np.testing.assert_array_equal(grid[y : y + 48, x : x + 48], level)
        caption = grid[y + 48 : y + 48 + strip, x : x + 48]
        assert caption.min() < 100, "no ink below the image"
    assert grid[:strip].min() < 100 and grid[strip : 2 * strip].min() < 100
    assert grid[2 * strip + 3 : 2 * strip + 51, :left].min() < 100


def test_long_captions_stay_inside():
    grid = grids.image_grid(
        constant([1, 1], 8, 8), columns=2, column_labels=["x" * 200, ""], title="word " * 60
    )
    bare = grids.image_grid(constant([1, 1], 8, 8), columns=2)
    assert grid.shape[1] == bare.shape[1] and grid.shape[0] > bare.shape[0] + 5 * 16
    top = grid.shape[0] - bare.shape[0]
    assert np.all(grid[top - grids.CAPTION_HEIGHT : top, 56:] == 255)


def test_values_out_of_range_are_clipped_and_broken_ones_are_magenta():
    image = np.array([-5.0, 5.0, np.nan, np.inf], np.float32).reshape(1, 2, 2, 1)
    grid = grids.image_grid(image, scale=1, pad=0)
    assert grid[0].tolist() == [[0] * 3, [255] * 3]
    assert grid[1].tolist() == [[255, 0, 255]] * 2
    shifted = grids.image_grid(constant([0.5]), scale=1, pad=0, value_range=(0.0, 1.0))
    assert np.all(shifted == 128)


def test_bytes_and_colours_pass_through():
    image = np.random.default_rng(0).integers(0, 256, (1, 4, 4, 3)).astype(np.uint8)
    np.testing.assert_array_equal(grids.image_grid(image, scale=1, pad=0), image[0])


def test_comparison_puts_one_set_per_row():
    sets = {"degraded": constant([-1, -1]), "truth": constant([1, 0])}
    grid = grids.comparison_grid(sets, scale=10, pad=0)
    assert grid.shape[0] == 2 * 20
    np.testing.assert_array_equal(grid[:20, -60:], 0)
    np.testing.assert_array_equal(grid[20:, -60:-30], 255)
    np.testing.assert_array_equal(grid[20:, -30:], 128)
    with pytest.raises(ValueError, match="one shape"):
        grids.comparison_grid({"a": constant([1]), "b": constant([1, 1])})


def test_trajectory_picks_ends_and_even_steps():
    states = np.linspace(-1, 1, 11)
    trajectory = np.stack([constant([v, -v, 0.0]) for v in states])
    strip = grids.trajectory_strip(trajectory, columns=3, rows=2, scale=2, pad=0)
    cells = strip[grids.CAPTION_HEIGHT :].reshape(2, 4, 3, 6, 3)
    got = cells[:, 0, :, 0, 0]
    np.testing.assert_array_equal(got, [[0, 128, 255], [255, 128, 0]])
    full = grids.trajectory_strip(trajectory, columns=50, scale=1, pad=0)
    assert full.shape == (16 + 3 * 2, 11 * 3, 3)
    last = grids.trajectory_strip(trajectory, columns=1, rows=1, scale=8, pad=0)
    assert np.all(last[16:] == 255)
    with pytest.raises(ValueError, match="expected 11 captions, got 3"):
        grids.trajectory_strip(trajectory, times=[1, 0.5, 0])
    with pytest.raises(ValueError, match=r"\[S, B, H, W, C\]"):
        grids.trajectory_strip(trajectory[0])


def test_rescaled_trajectories_keep_structure_under_large_noise():
    wave = np.linspace(-1, 1, 8, dtype=np.float32).reshape(1, 1, 1, 8, 1) * np.ones((1, 1, 8, 1, 1))
    trajectory = np.concatenate([80 * wave, 0.5 * wave]).astype(np.float32)
    options = {"scale": 1, "pad": 0, "columns": 2}
    plain = grids.trajectory_strip(trajectory, **options)[16:, :8]
    scaled = grids.trajectory_strip(trajectory, rescale=True, **options)[16:]
    assert len(np.unique(plain)) == 2
    assert len(np.unique(scaled[:, :8])) == 8
    np.testing.assert_array_equal(
        scaled[:, 8:], grids.image_grid(trajectory[1], scale=1, pad=0), "column in range untouched"
    )


def test_token_images():
    tokens = np.array([[0, 16, 17, 8]])
    got = grids.tokens_to_images(tokens, 17, (2, 2), mask_colour=(1.0, -1.0, 0.5))
    assert got.shape == (1, 2, 2, 3) and got.dtype == np.float32
    assert got[0].reshape(4, 3).tolist() == [[-1] * 3, [1] * 3, [1, -1, 0.5], [0] * 3]
    assert grids.tokens_to_images(np.zeros((5, 3, 64), int), 17, (8, 8)).shape == (5, 3, 8, 8, 3)
    with pytest.raises(ValueError, match=r"0 \.\. 17 .* got 0 \.\. 18"):
        grids.tokens_to_images(np.array([[0, 18]]), 17, (1, 2))
    with pytest.raises(ValueError, match=r"\[..., 4\]"):
        grids.tokens_to_images(np.array([[0, 1]]), 17, (2, 2))


def test_text_is_drawn_wrapped_and_numbered():
    short = grids.text_image(["to be"], width=200)
    assert short.shape[1] == 200 and short.min() < 100
    words = "to be or not to be that is the question " * 8
    long = grids.text_image([words], width=200)
    assert long.shape[0] >= 5 * grids.CAPTION_HEIGHT
    assert np.all(long[:, -5:] == 255), "ink beyond the margin"
    unbroken = grids.text_image(["x" * 400], width=200)
    assert unbroken.shape[0] > 5 * grids.CAPTION_HEIGHT and np.all(unbroken[:, -5:] == 255)
    assert grids.text_image(["a\nb"]).shape[0] == short.shape[0] + grids.CAPTION_HEIGHT
    with pytest.raises(ValueError, match="non-empty list of texts"):
        grids.text_image([])


def test_png_round_trip_with_metadata(tmp_path):
    array = np.random.default_rng(0).integers(0, 256, (5, 7, 3)).astype(np.uint8)
    path = grids.save_png(tmp_path / "new" / "grid.png", array, metadata={"nfe": 20})
    with Image.open(path) as picture:
        np.testing.assert_array_equal(np.array(picture), array)
        assert picture.text["nfe"] == "20"
    assert [p.name for p in path.parent.iterdir()] == ["grid.png"]
    with pytest.raises(ValueError, match="need uint8"):
        grids.save_png(path, array / 255.0)


def test_refusals():
    with pytest.raises(ValueError, match=r"\[N, H, W, 1 or 3\]"):
        grids.image_grid(np.zeros((2, 8, 8, 2)))
    with pytest.raises(ValueError, match="labels: expected 2 captions, got 1"):
        grids.image_grid(np.zeros((2, 8, 8, 1)), labels=["a"])
    with pytest.raises(ValueError, match="row_labels: expected 1"):
        grids.image_grid(np.zeros((2, 8, 8, 1)), row_labels=["a", "b"])
    with pytest.raises(ValueError, match="value_range"):
        grids.image_grid(np.zeros((2, 8, 8, 1)), value_range=(1, 0))
    with pytest.raises(ValueError, match="columns >= 1"):
        grids.image_grid(np.zeros((2, 8, 8, 1)), columns=0)
