import base64
import io
import struct
import zlib

import numpy as np
import pytest
from PIL import Image

from jaxlora.data.images import image_size, load_image, resize_image, resized_size


def picture(width=40, height=30, mode="RGB"):
    pixels = np.random.default_rng(0).integers(0, 256, (height, width, 3), np.uint8)
    return Image.fromarray(pixels).convert(mode)


def encoded(image, kind="PNG", **options):
    out = io.BytesIO()
    image.save(out, kind, **options)
    return out.getvalue()


def png_header(width, height):
    def chunk(name, body):
        return struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")


@pytest.mark.parametrize("kind", ["PNG", "BMP", "TIFF", "WEBP", "GIF"])
def test_lossless_formats_give_their_pixels(kind):
    image = picture().convert("P").convert("RGB") if kind == "GIF" else picture()
    options = {"lossless": True} if kind == "WEBP" else {}
    assert np.array_equal(np.asarray(load_image(encoded(image, kind, **options))), np.asarray(image))


def test_path_bytes_base64_mapping_and_array_are_the_same_image(tmp_path):
    data = encoded(picture())
    (tmp_path / "a.png").write_bytes(data)
    text = base64.b64encode(data).decode()
    sources = [tmp_path / "a.png", str(tmp_path / "a.png"), data, f"data:image/png;base64,{text}", text, {"bytes": data, "path": None}]
    sources += [{"bytes": None, "path": str(tmp_path / "a.png")}, np.asarray(picture()), picture()]
    for source in sources:
        assert np.array_equal(np.asarray(load_image(source)), np.asarray(picture()))
        assert image_size(source) == (40, 30)


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("kind", ["PNG", "TIFF"])
def test_exif_orientation_is_applied_and_measured(orientation, kind):
    # The eight EXIF orientations, as what must be done to the stored array.
    undo = [lambda a: a, np.fliplr, lambda a: np.rot90(a, 2), np.flipud, lambda a: a.swapaxes(0, 1)]
    undo += [lambda a: np.rot90(a, -1), lambda a: np.rot90(a, 2).swapaxes(0, 1), np.rot90]
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = encoded(picture(), kind, exif=exif)
    expected = undo[orientation - 1](np.asarray(picture()))
    assert np.array_equal(np.asarray(load_image(data)), expected)
    assert image_size(data) == expected.shape[1::-1]


def test_transparency_is_put_on_white():
    image = Image.new("RGBA", (2, 1), (10, 20, 30, 0))
    image.putpixel((1, 0), (10, 20, 30, 255))
    assert np.asarray(load_image(encoded(image))).tolist() == [[[255, 255, 255], [10, 20, 30]]]


def test_16_bit_grey_is_scaled_not_clipped():
    image = Image.fromarray(np.array([[0, 32768, 65535]], np.uint16))
    assert np.asarray(load_image(encoded(image)))[0, :, 0].tolist() == [0, 128, 255]


@pytest.mark.parametrize("mode", ["L", "LA", "P", "1", "CMYK"])
def test_every_mode_becomes_rgb(mode):
    image = load_image(encoded(picture(mode=mode), "JPEG" if mode == "CMYK" else "PNG"))
    assert (image.mode, image.size) == ("RGB", (40, 30))


def test_the_first_frame_of_an_animation_is_taken():
    frames = [Image.new("RGB", (4, 4), color) for color in ("red", "blue")]
    data = encoded(frames[0], "GIF", save_all=True, append_images=frames[1:])
    assert np.asarray(load_image(data))[0, 0].tolist() == [255, 0, 0]


@pytest.mark.parametrize("share", [0.1, 0.5, 0.9])
@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP"])
def test_a_cut_file_is_refused_by_name(share, kind):
    data = encoded(picture(200, 200), kind)
    with pytest.raises(ValueError, match="row 7, image 0"):
        load_image(data[: int(len(data) * share)], where="row 7, image 0")


@pytest.mark.parametrize(
    ("source", "message"),
    [
        (b"", "not a readable"),
        (None, "got NoneType"),
        (b"<svg xmlns='http://www.w3.org/2000/svg'/>", "not a readable"),
        (encoded(picture(), "PPM"), "not a readable"),
        (encoded(picture(), "EPS"), "not a readable"),
        (png_header(9000, 9000), "81000000 pixels"),
        (png_header(20000, 20000), "row 0"),
        ("https://example.com/a.png", "is a URL"),
        ("file:///etc/passwd", "is a URL"),
        ("/etc/passwd", "not a readable"),
        ("data:image/png;base64,@@@@", "valid base64"),
        ("Z" * 300, "not a readable"),
        ("no-such-file.png", "FileNotFoundError"),
        (np.zeros((3, 4, 5), np.uint8), "channels last"),
        (np.zeros((4, 4, 3), np.float32), "float32"),
        (Image.new("F", (3, 3)), "floating-point"),
    ],
)
@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
def test_what_is_no_safe_image_is_refused_by_name(source, message):
    with pytest.raises(ValueError, match="row 0, image 1") as caught:
        load_image(source, where="row 0, image 1")
    assert message in str(caught.value)


def test_a_path_may_not_leave_the_image_root(tmp_path):
    (tmp_path / "inside").mkdir()
    (tmp_path / "a.png").write_bytes(encoded(picture()))
    (tmp_path / "inside" / "link.png").symlink_to(tmp_path / "a.png")
    (tmp_path / "inside" / "b.png").write_bytes(encoded(picture()))
    for path in ("../a.png", str(tmp_path / "a.png"), "link.png"):
        with pytest.raises(ValueError, match="leaves the image root"):
            load_image(path, image_root=tmp_path / "inside")
    assert load_image("b.png", image_root=tmp_path / "inside").size == (40, 30)


def test_a_bomb_is_refused_without_decoding():
    with pytest.raises(ValueError, match="at most 100 are decoded"):
        image_size(encoded(picture()), max_pixels=100)


@pytest.mark.parametrize(
    ("size", "target", "dimension", "multiple", "expected"),
    [
        ((1000, 500), None, 0, None, (1000, 500)),
        ((1000, 500), 512, 0, None, (512, 256)),
        ((500, 1000), 512, 0, None, (500, 1000)),
        ((500, 1000), 512, 1, None, (256, 512)),
        ((500, 1000), 512, "max", None, (256, 512)),
        ((600, 1000), 512, "min", None, (512, 853)),
        ((10000, 3), 512, 0, None, (512, 1)),
        ((1000, 500), 512, 0, 28, (504, 252)),
        ((10000, 3), 512, 0, 28, (504, 28)),
        ((10, 10), (33, 44), 0, None, (33, 44)),
    ],
)
def test_the_resize_rule(size, target, dimension, multiple, expected):
    assert resized_size(size, target, dimension=dimension, multiple=multiple) == expected
    assert resize_image(Image.new("RGB", size), target, dimension=dimension, multiple=multiple).size == expected
