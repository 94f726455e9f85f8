"""The user's own code and files, and what is said of those that do not do."""

import io
import textwrap

import numpy as np
import pytest
import torch
from torch import nn

from assay.data import DataUnavailable, load
from assay.examine import examine
from assay.examine.loading import load_callable, load_data, load_model
from assay.examine.sources import as_data, draw
from assay.lab import UsageError

CODE = """
import torch
from torch import nn
import beside

class Net(nn.Linear):
    pass

def build():
    torch.manual_seed(0)
    return Net(4, beside.CLASSES)

def number():
    return 3

def broken():
    raise RuntimeError("no such layer\\nsecond line")

THREE = 3
"""


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "beside.py").write_text("CLASSES = 3\n")
    (tmp_path / "model.py").write_text(textwrap.dedent(CODE))
    (tmp_path / "wrong.py").write_text("def build(:\n")
    (tmp_path / "notes.txt").write_text("nothing")
    return tmp_path


def test_a_model_comes_from_a_file_that_imports_its_neighbour(folder):
    model = load_model(f"{folder}/model.py:build")
    assert model.weight.shape == (3, 4)
    assert load_callable("torch.nn:Linear", "model") is nn.Linear


@pytest.mark.parametrize(
    ("spec", "said"),
    [
        ("model.py", "give FILE.py:NAME"),
        ("model.py:", "give FILE.py:NAME"),
        ("absent.py:build", "there is no file"),
        ("model.py:biuld", "did you mean build"),
        ("model.py:THREE", "is not a callable but of type int"),
        ("model.py:number", "returned no torch.nn.Module but an object of type int"),
        ("model.py:broken", "fails: RuntimeError: no such layer"),
        ("wrong.py:build", "SyntaxError"),
        ("no_such_module_of_anybody:build", "ModuleNotFoundError"),
    ],
)
def test_what_is_wrong_with_a_model_is_one_line(folder, spec, said):
    where = spec if spec.startswith("no_such") else f"{folder}/{spec}"
    with pytest.raises(UsageError) as caught:
        load_model(where)
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)


def test_weights_come_from_safetensors_and_from_checkpoints(folder):
    from safetensors.torch import save_file

    state = {"weight": torch.randn(3, 4), "bias": torch.randn(3)}
    save_file(state, folder / "w.safetensors")
    torch.save(state, folder / "w.pt")
    torch.save({"epoch": 3, "state_dict": state}, folder / "nested.pt")
    for name in ("w.safetensors", "w.pt", "nested.pt"):
        model = load_model(f"{folder}/model.py:build", folder / name)
        assert torch.equal(model.weight, state["weight"]), name


class Evil:
    def __reduce__(self):
        return (print, ("executed",))


def test_weights_that_do_not_do_are_refused(folder, capsys):
    torch.save({"weight": torch.zeros(2, 2)}, folder / "other.pt")
    torch.save([1, 2], folder / "list.pt")
    torch.save(Evil(), folder / "evil.pt")
    for name, said in {
        "absent.pt": "no file",
        "other.pt": "does not fit",
        "list.pt": "no state dict",
        "evil.pt": "cannot be read",
        "notes.txt": "cannot be read",
    }.items():
        with pytest.raises(UsageError, match=said):
            load_model(f"{folder}/model.py:build", folder / name)
    assert "executed" not in capsys.readouterr().out


def test_an_unknown_device_is_one_line(folder):
    with pytest.raises(UsageError, match="device 'gpu'"):
        load_model(f"{folder}/model.py:build", device="gpu")


def test_an_exported_program_is_examined(tmp_path):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3))
    batch = torch.export.Dim("batch", min=1, max=4096)
    program = torch.export.export(model, (torch.randn(5, 4),), dynamic_shapes=({0: batch},))
    torch.export.save(program, tmp_path / "net.pt2")
    loaded = load_model(f"{tmp_path}/net.pt2")
    x = torch.randn(7, 4)
    assert torch.allclose(loaded(x), model(x), atol=1e-6)
    report = examine(loaded, {"train": (x, torch.arange(7) % 3)}, panels=["card"], budget=5)
    assert report.parameters == sum(p.numel() for p in model.parameters())
    (tmp_path / "bad.pt2").write_bytes(b"nothing")
    with pytest.raises(UsageError, match="not an exported program"):
        load_model(f"{tmp_path}/bad.pt2")


def test_arrays_come_from_an_npz(tmp_path):
    path = tmp_path / "arrays.npz"
    x, y = np.random.default_rng(0).normal(size=(9, 4)).astype(np.float32), np.arange(9) % 3
    np.savez(path, x_train=x, y_train=y, x_test=x[:3], y_test=y[:3], classes=["a", "b", "c"])
    data = load_data(str(path))
    assert list(data.classes) == ["a", "b", "c"]
    assert draw(data.train, 100, 0).x.shape == (9, 4)
    assert draw(data.test, 100, 0).y.tolist() == [0, 1, 2]
    np.savez(tmp_path / "odd.npz", pixels=x)
    with pytest.raises(UsageError, match="must hold x_train"):
        load_data(str(tmp_path / "odd.npz"))
    np.savez(tmp_path / "pickled.npz", x=np.array([Evil()], dtype=object), y=y[:1])
    with pytest.raises(UsageError, match="cannot be read"):
        load_data(str(tmp_path / "pickled.npz"))
    whole = path.read_bytes()
    for length in (0, 40, len(whole) // 2, len(whole) - 30):
        path.write_bytes(whole[:length])
        with pytest.raises(UsageError, match="cannot be read"):
            load_data(str(path))
    np.savez(tmp_path / "names.npz", x=x, y=np.array(["cat"] * 9))
    with pytest.raises(UsageError, match="y must hold numbers, got <U3"):
        load_data(str(tmp_path / "names.npz"))


def png(pixels):
    from PIL import Image

    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, format="png")
    return buffer.getvalue()


def test_images_come_from_folders(tmp_path):
    rng = np.random.default_rng(0)
    for split, count in {"train": 4, "test": 2}.items():
        for name in ("cat", "<b>dog</b>".replace("/", "")):
            place = tmp_path / split / name
            place.mkdir(parents=True)
            for i in range(count):
                pixels = rng.integers(0, 256, (6, 5, 3), dtype=np.uint8)
                (place / f"{i}.png").write_bytes(png(pixels))
    data = load_data(str(tmp_path))
    drawn = draw(data.train, 100, 0)
    assert drawn.x.shape == (8, 3, 6, 5)
    assert 0 <= float(drawn.x.min()) < float(drawn.x.max()) <= 1
    assert drawn.y.bincount().tolist() == [4, 4]
    assert len(draw(data.test, 100, 0).y) == 4
    (tmp_path / "train" / "cat" / "0.png").write_bytes(b"nothing")
    with pytest.raises(DataUnavailable, match="not an image"):
        draw(data.train, 100, 0)
    with pytest.raises(UsageError, match="neither"):
        load_data(str(tmp_path / "train" / "cat"))


def test_rows_come_from_a_dataset_folder(tmp_path):
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    rng = np.random.default_rng(0)
    images = [{"bytes": png(rng.integers(0, 256, (4, 4), dtype=np.uint8)), "path": None}
              for _ in range(6)]  # fmt: skip
    table = pyarrow.table({"image": images, "label": [0, 1, 2, 0, 1, 2]})
    parquet.write_table(table, tmp_path / "train-00000-of-00001.parquet")
    data = load_data(str(tmp_path))
    drawn = draw(data.train, 100, 0)
    assert drawn.x.shape == (6, 1, 4, 4)
    assert drawn.y.tolist() == [0, 1, 2, 0, 1, 2]
    assert data.test is None


def test_names_and_callables_give_data(folder):
    assert load_data("digits").name == "digits"
    code = "import torch\ndef load():\n    return (torch.zeros(4, 2), torch.arange(4) % 2)\n"
    (folder / "data.py").write_text(code)
    assert draw(as_data(load_data(f"{folder}/data.py:load")).train, 9, 0).size == 4
    for spec, said in {
        "digit": "did you mean digits",
        f"{folder}/notes.txt": "neither a folder nor",
        f"{folder}/absent.npz": "no file",
        f"{folder}/model.py:broken": "fails: RuntimeError",
    }.items():
        with pytest.raises(UsageError, match=said):
            load_data(spec)


def test_only_chosen_images_are_read(tmp_path, monkeypatch):
    from assay.data import image_folder

    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        for i in range(50):
            (tmp_path / name / f"{i}.png").write_bytes(png(np.zeros((2, 2), np.uint8)))
    read, image = [], image_folder.read_image
    monkeypatch.setattr(image_folder, "read_image", lambda file: read.append(file) or image(file))
    assert draw(load_data(str(tmp_path)).train, 10, 0).y.bincount().tolist() == [5, 5]
    assert len(read) <= 11


def test_assays_own_data_set_is_whole():
    train = load("digits", "train")
    assert draw(train, 10**6, 0).size == len(train)
