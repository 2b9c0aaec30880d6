"""The family of exceptions."""

import copy
import errno
import os
import pickle
import re

import pytest
from memory import run

import transformer_rs as tr

BUILTIN = {
    "ShapeError": ValueError,
    "ConfigError": ValueError,
    "NonFiniteError": ValueError,
    "CheckpointError": ValueError,
    "DTypeError": TypeError,
    "TokenOutOfRangeError": IndexError,
    "UnsupportedError": NotImplementedError,
    "OutOfMemoryError": MemoryError,
    "StorageError": OSError,
    "PullbackError": RuntimeError,
    "InternalError": RuntimeError,
}


def test_every_member_of_the_family_is_known_here():
    assert set(tr.errors.__all__) == {"TransformerRsError", *BUILTIN}


@pytest.mark.parametrize("name", BUILTIN)
def test_each_error_has_the_base_a_builtin_and_survives_copies(name):
    error = getattr(tr, name)("layer_norm: argument `x`: got (2, 3)")
    assert isinstance(error, tr.TransformerRsError) and isinstance(error, BUILTIN[name])
    for again in (pickle.loads(pickle.dumps(error)), copy.deepcopy(error)):
        assert type(again) is type(error) and str(again) == str(error) == "layer_norm: argument `x`: got (2, 3)"


def test_memory_that_is_not_there_is_an_error_and_the_process_lives():
    done = run("""
x = np.ones((1, 4, 20_000, 8), np.float32)
limit(1024)
try:
    tr.functional.attention(x, x, x, keep=np.ones((1, 1), bool), return_weights=True)
except MemoryError as error:
    print(type(error).__name__, error)
print(tr.functional.relu(np.ones(2)))
""")
    assert done.returncode == 0, done.stderr
    assert re.match(r"OutOfMemoryError .*cannot allocate \d+ .*\n\[1\. 1\.\]", done.stdout), done.stdout


def test_a_refusal_of_the_file_system_has_its_number(tmp_path):
    (tmp_path / "file").write_text("")
    config = tr.TransformerConfig(src_vocab=9, tgt_vocab=9, d_model=16, n_heads=2, d_ff=8)
    for call, number in (
        (lambda: tr.Transformer.load(tmp_path / "nowhere"), errno.ENOENT),
        (lambda: tr.Transformer(config).save(tmp_path / "file" / "below"), errno.ENOTDIR),
        (lambda: tr.Bert.from_pretrained(tmp_path / "nowhere"), errno.ENOENT),
    ):
        with pytest.raises(tr.StorageError) as caught:
            call()
        for error in (caught.value, pickle.loads(pickle.dumps(caught.value))):
            assert (error.errno, error.strerror) == (number, os.strerror(number))
            assert str(error).startswith(str(tmp_path)) and str(error).endswith(f"(os error {number})")
    plain = tr.StorageError("no number")
    assert (str(plain), str(tr.StorageError()), plain.errno) == ("no number", "", None)
