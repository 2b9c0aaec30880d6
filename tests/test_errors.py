"""The family of exceptions."""

import copy
import pickle

import pytest

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
