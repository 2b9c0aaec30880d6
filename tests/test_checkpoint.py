"""Files: what is written, what is read, and what damage does."""

import json
import os
import re
import shutil
import subprocess
import sys
import time

import numpy as np
import pytest
from clocks import PATIENCE
from small_models import encoder, header_of, write

import transformer_rs as tr

SRC, TGT = [[3, 4, 5], [7]], [[5, 3], [4]]


def model_of(seed=0, **values):
    small = {"d_model": 16, "n_heads": 2, "n_encoder_layers": 1, "n_decoder_layers": 1, "d_ff": 24, "dropout": 0.1}
    return tr.Transformer(tr.TransformerConfig(**{"src_vocab": 9, "tgt_vocab": 9, **small, **values}), seed=seed)


def trained(**values):
    trainer = tr.Trainer(model_of(**values), optimizer=tr.AdamW(lr=0.01), seed=0)
    trainer.step(SRC, TGT)
    return trainer


def assert_same(one, other):
    one, other = one.state_dict(), other.state_dict()
    assert one.keys() == other.keys()
    for name, array in one.items():
        assert np.array_equal(array, other[name]), name


@pytest.mark.parametrize(
    "values", [{}, {"norm": "batch"}, {"tie_embeddings": "all"}, {"positions": "learned", "max_positions": 9}]
)
def test_a_model_comes_back_bit_for_bit(tmp_path, values):
    model = trained(**values).model
    model.save(tmp_path / "a" / "b")
    again = tr.Transformer.load(str(tmp_path / "a" / "b"))
    assert_same(model, again)
    assert again.config == model.config and again.seed is None
    assert [ids.tolist() for ids in again.generate(SRC)] == [ids.tolist() for ids in model.generate(SRC)]


def test_the_files_are_what_they_should_be(tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    model = model_of()
    model.save(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["config.json", "model.safetensors", "notes.txt"]
    config = json.loads((tmp_path / "config.json").read_text())
    assert (config["format_version"], config["model_type"], config["d_model"]) == (1, "transformer", 16)
    header, data = header_of(tmp_path / "model.safetensors")
    assert json.loads(header.pop("__metadata__")["config"]) == config
    for name, array in model.state_dict().items():
        entry = header.pop(name)
        start, end = entry["data_offsets"]
        assert entry["dtype"] == "F32" and entry["shape"] == list(array.shape)
        assert np.array_equal(np.frombuffer(data[start:end], "<f4").reshape(array.shape), array)
    assert not header


def test_saving_again_replaces_and_the_other_files_stay(tmp_path):
    trainer = trained()
    trainer.save(tmp_path)
    (tmp_path / "notes.txt").write_text("mine")
    trainer.step(SRC, TGT)
    trainer.save(tmp_path)
    names = sorted(path.name for path in tmp_path.iterdir())
    assert names == ["config.json", "model.safetensors", "notes.txt", "trainer-2.safetensors"]
    assert_same(tr.Transformer.load(tmp_path), trainer.model)


def test_a_trainer_comes_back_whole(tmp_path):
    model = model_of(norm="batch", dropout=0.3)
    settings = {
        "optimizer": tr.Adam(lr=0.02, betas=(0.8, 0.9), weight_decay=0.1, no_decay=("*.bias",)),
        "schedule": tr.schedules.Cosine(warmup=2, total=9, floor=0.1),
        "label_smoothing": 0.1,
        "clip_norm": 0.5,
        "freeze": ("encoder.*",),
        "seed": 2**64 - 1,
    }
    trainer = tr.Trainer(model, **settings)
    for _ in range(5):
        trainer.step(SRC, TGT)
    trainer.save(tmp_path)
    again = tr.Trainer.load(tmp_path)
    assert (again.optimizer, again.schedule, again.seed) == (
        settings["optimizer"],
        settings["schedule"],
        settings["seed"],
    )
    assert again.model is not model and again.n_steps == 5 and again.compute == "f32"
    for _ in range(5):
        assert again.step(SRC, TGT) == trainer.step(SRC, TGT)
    assert_same(again.model, model)
    assert "trainer" not in tr.Transformer.load(tmp_path).config.to_json()


def test_a_tied_int8_matrix_may_come_under_each_of_its_names():
    model = model_of(tie_embeddings="target").quantize("int8")
    arrays = model.state_dict()
    again = model_of(seed=1, tie_embeddings="target").quantize("int8")
    again.load_state_dict({**arrays, "head.weight": arrays["tgt_embedding.weight"]})
    assert_same(again, model)
    with pytest.raises(tr.CheckpointError, match=r"`tgt_embedding\.weight` and `head\.weight` are one matrix"):
        again.load_state_dict({**arrays, "head.weight": -arrays["tgt_embedding.weight"]})
    assert_same(again, model)


def test_a_model_alone_is_no_trainer(tmp_path):
    model_of().save(tmp_path)
    with pytest.raises(tr.CheckpointError, match="no trainer saved this model"):
        tr.Trainer.load(tmp_path)


class TestDamage:
    """Every damage is a CheckpointError, and what is in memory stays usable."""

    @pytest.fixture
    def folder(self, tmp_path):
        trained().save(tmp_path)
        return tmp_path

    def refused(self, folder, text=None, load=tr.Transformer.load):
        with pytest.raises(tr.CheckpointError, match=text) as raised:
            load(folder)
        assert str(folder) in str(raised.value)

    def test_truncated(self, folder):
        path = folder / "model.safetensors"
        data = path.read_bytes()
        for n in (0, 4, 8, 100, len(data) // 2, len(data) - 1):
            path.write_bytes(data[:n])
            self.refused(folder)
        path.write_bytes(data + b"x")
        self.refused(folder)

    def test_corrupt(self, folder):
        path = folder / "model.safetensors"
        data = path.read_bytes()
        rng = np.random.default_rng(0)
        state, loaded = tr.Transformer.load(folder).state_dict(), 0
        for _ in range(50):
            broken = bytearray(data)
            broken[rng.integers(0, 300)] ^= 1 << rng.integers(0, 8)
            path.write_bytes(broken)
            try:
                again = tr.Transformer.load(folder).state_dict()
            except (tr.CheckpointError, tr.StorageError):
                continue
            loaded += 1  # the bit was in a name of no weight or in a number of the config
            assert again.keys() == state.keys() and all(np.array_equal(again[name], state[name]) for name in state)
        assert 0 < loaded < 25

    def test_swapped_tensors(self, folder):
        path = folder / "model.safetensors"
        header, data = header_of(path)
        one, other = "head.weight", "head.bias"
        header[one], header[other] = header[other], header[one]
        write(path, header, data)
        self.refused(folder, r"2 unfit \(`head\.weight`.*`head\.bias`|2 unfit \(`head\.bias`.*`head\.weight`")

    def test_renamed_and_missing_tensors(self, folder):
        path = folder / "model.safetensors"
        header, data = header_of(path)
        header["tail.weight"] = header.pop("head.weight")
        write(path, header, data)
        self.refused(folder, r"1 missing \(`head\.weight`\).*1 unexpected \(`tail\.weight`\)")

    def test_a_config_that_does_not_fit_the_weights(self, folder):
        path = folder / "model.safetensors"
        header, data = header_of(path)
        config = json.loads(header["__metadata__"]["config"])
        for change, text in (
            ({"d_ff": 32}, "feed_forward"),
            ({"n_decoder_layers": 2}, r"decoder\.layers\.1"),
            ({"tie_embeddings": "target"}, "head.weight"),
            ({"n_heads": 5}, "n_heads"),
            ({"wrap": 1}, "wrap"),
        ):
            header["__metadata__"]["config"] = json.dumps({**config, **change})
            write(path, header, data)
            self.refused(folder, text)

    def test_another_kind_of_model(self, folder):
        path = folder / "model.safetensors"
        header, data = header_of(path)
        config = json.loads(header["__metadata__"]["config"])
        for change, text in (({"model_type": "gpt"}, "gpt"), ({"format_version": 99}, "newer")):
            header["__metadata__"]["config"] = json.dumps({**config, **change})
            write(path, header, data)
            self.refused(folder, text)

    def test_a_torn_pair_is_read_by_the_model_file(self, folder):
        (folder / "config.json").write_text("{")
        assert tr.Transformer.load(folder).config.d_model == 16
        (folder / "config.json").unlink()
        assert tr.Transformer.load(folder).config.d_model == 16

    def test_the_trainers_state(self, folder):
        path = folder / "trainer-1.safetensors"
        data = path.read_bytes()
        path.write_bytes(data[:-5])
        self.refused(folder, load=tr.Trainer.load)
        path.write_bytes(data)
        assert tr.Trainer.load(folder).n_steps == 1
        path.unlink()
        with pytest.raises(tr.StorageError, match="trainer-1"):
            tr.Trainer.load(folder)
        assert tr.Transformer.load(folder).config.d_model == 16

    def test_what_is_not_there(self, tmp_path):
        for load in (tr.Transformer.load, tr.Trainer.load):
            with pytest.raises(tr.StorageError, match="nowhere"):
                load(tmp_path / "nowhere")
            with pytest.raises(OSError):
                load(tmp_path / "nowhere")


class TestRefusingFolders:
    def test_a_file_stands_in_the_way(self, tmp_path):
        (tmp_path / "file").write_text("mine")
        trainer = trained()
        for save in (trainer.save, trainer.model.save):
            for folder in (tmp_path / "file", tmp_path / "file" / "below"):
                with pytest.raises(tr.StorageError, match="file"):
                    save(folder)
        assert (tmp_path / "file").read_text() == "mine"
        assert trainer.step(SRC, TGT).step == 2

    @pytest.mark.skipif(not sys.platform.startswith("linux"), reason="/proc")
    def test_a_folder_that_nobody_can_write_into(self):
        trainer = trained()
        for save in (trainer.save, trainer.model.save):
            with pytest.raises(tr.StorageError, match="/proc"):
                save("/proc")
        assert trainer.step(SRC, TGT).step == 2

    def test_a_failed_save_leaves_the_old_model(self, tmp_path):
        trainer = trained()
        trainer.save(tmp_path)
        old = trainer.model.state_dict()
        trainer.step(SRC, TGT)
        shutil.move(tmp_path / "config.json", tmp_path / "old.json")
        (tmp_path / "config.json").mkdir()
        with pytest.raises(tr.StorageError, match=r"config\.json: a folder stands where a file goes; move it away"):
            trainer.save(tmp_path)
        loaded = tr.Transformer.load(tmp_path).state_dict()
        assert all(np.array_equal(loaded[k], old[k]) for k in old)
        assert not [path.name for path in tmp_path.iterdir() if path.name.endswith(".tmp")]


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="a limit on the size of files")
def test_a_full_disk_leaves_the_old_checkpoint(tmp_path):
    """Files may not grow beyond 20 kB: the write fails half-way, as on a disk that is full."""
    code = """
import resource, signal, sys
import numpy as np
import transformer_rs as tr
config = tr.TransformerConfig(src_vocab=9, tgt_vocab=9, d_model=64, n_heads=2, n_encoder_layers=1, n_decoder_layers=1, d_ff=256)
trainer = tr.Trainer(tr.Transformer(config, seed=0), seed=0)
trainer.save(sys.argv[1])
old = trainer.model.state_dict()
trainer.step([[3]], [[4]])
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
limits = resource.getrlimit(resource.RLIMIT_FSIZE)
resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, limits[1]))
for save in (trainer.save, trainer.model.save):
    try:
        save(sys.argv[1])
        sys.exit("it was saved")
    except tr.StorageError as error:
        print(error)
resource.setrlimit(resource.RLIMIT_FSIZE, limits)
again = tr.Trainer.load(sys.argv[1])
assert again.n_steps == 0
assert all(np.array_equal(array, old[name]) for name, array in again.model.state_dict().items())
assert trainer.step([[3]], [[4]]).step == 2
trainer.save(sys.argv[1])
assert tr.Trainer.load(sys.argv[1]).n_steps == 2
"""
    run = subprocess.run([sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True, timeout=PATIENCE)
    assert run.returncode == 0, run.stderr
    assert run.stdout.count("File too large") == 2
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "config.json",
        "model.safetensors",
        "trainer-2.safetensors",
    ]


def test_kill_during_save_leaves_one_whole_checkpoint(tmp_path):
    """Killed at any moment, the folder holds a model and a trainer of the same step."""
    code = """
import sys
import transformer_rs as tr
config = tr.TransformerConfig(src_vocab=9, tgt_vocab=9, d_model=64, n_heads=2, n_encoder_layers=1, n_decoder_layers=1, d_ff=256)
trainer = tr.Trainer(tr.Transformer(config, seed=0), seed=0)
while True:
    trainer.step([[3]], [[4]])
    trainer.save(sys.argv[1])
    print(trainer.n_steps, flush=True)
"""
    reached = 0
    for attempt in range(6):
        process = subprocess.Popen([sys.executable, "-c", code, str(tmp_path)], stdout=subprocess.PIPE, text=True)
        for _ in range(2):
            process.stdout.readline()
        time.sleep(0.003 * attempt)
        process.kill()
        rest = process.communicate()[0].split()
        trainer = tr.Trainer.load(tmp_path)
        reached = trainer.n_steps
        assert reached >= max([2, *map(int, rest)])
        trainer.step([[3]], [[4]])
        assert np.isfinite(trainer.model.state_dict()["head.weight"]).all()
    trainer.save(tmp_path)
    config, model, state = sorted(path.name for path in tmp_path.iterdir())
    assert (config, model) == ("config.json", "model.safetensors")
    # The plain name may have been that of a state whose model was not in place yet.
    assert re.fullmatch(rf"trainer-{reached + 1}(-\d+)?\.safetensors", state)


def test_paths_of_any_kind_and_none(tmp_path):
    model, encoder_model = model_of(), encoder()
    trainer = tr.Trainer(model, seed=0)
    for thing in (model, encoder_model, trainer):
        load = type(thing).load
        thing.save(os.fsencode(tmp_path / "bytes"))
        assert isinstance(load(os.fsencode(tmp_path / "bytes")), type(thing))
        for call in (thing.save, load):
            with pytest.raises(tr.ConfigError, match="argument `folder`: expected a path, got an empty text"):
                call("")
            with pytest.raises(tr.DTypeError, match="argument `folder`: expected a path, got NoneType"):
                call(None)
