"""The cache of compiles and the lock on libtpu."""

import contextvars
import subprocess
import sys

import pytest

from graphs.errors import MeshwrightError
from placement import compile_cache


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    monkeypatch.setenv("MESHWRIGHT_CACHE_DIR", str(tmp_path / "cache"))
    return tmp_path / "cache"


def test_entries_come_back_and_damaged_ones_are_made_again(folder):
    place = compile_cache.cache_dir("compiled")
    compile_cache.store_entry(place, "k", {"status": "ok", "seconds": 1.5})
    assert compile_cache.load_entry(place, "k") == {"status": "ok", "seconds": 1.5}
    (place / "k.json").write_text('{"status": "o')
    assert compile_cache.load_entry(place, "k") is None
    assert compile_cache.load_entry(place, "other") is None


def test_text_round_trips_and_damage_is_one_sentence(folder):
    path = compile_cache.cache_dir("compiled") / "m.txt.gz"
    compile_cache.store_text(path, "HloModule é\n")
    assert compile_cache.load_text(path) == "HloModule é\n"
    path.write_bytes(path.read_bytes()[:-6])
    with pytest.raises(MeshwrightError, match="compile again"):
        compile_cache.load_text(path)


def test_keys_tell_every_fact_apart():
    facts = {"module": "a", "device_order": [0, 1], "versions": {"jax": "1"}}
    keys = {
        compile_cache.key_of(facts),
        compile_cache.key_of({**facts, "device_order": [1, 0]}),
        compile_cache.key_of({**facts, "versions": {"jax": "2"}}),
    }
    assert len(keys) == 3
    assert compile_cache.key_of(facts) == compile_cache.key_of(dict(reversed(facts.items())))


def test_a_folder_that_cannot_be_made_names_the_variable(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("MESHWRIGHT_CACHE_DIR", str(tmp_path / "file"))
    with pytest.raises(MeshwrightError, match="MESHWRIGHT_CACHE_DIR"):
        compile_cache.cache_dir("compiled")


def test_no_half_written_file_is_left_where_writing_fails(tmp_path):
    with pytest.raises(MeshwrightError, match="cannot be written"):
        compile_cache.write_atomically(tmp_path / "none" / "file", b"x")
    assert list(tmp_path.glob("**/.*")) == []


def elsewhere(timeout_s):
    """Take the lock as another part of the program would, without what is held here."""

    def take():
        with compile_cache.libtpu_lock(timeout_s=timeout_s):
            pass

    contextvars.Context().run(take)


def test_the_lock_excludes_and_is_free_again():
    with compile_cache.libtpu_lock() as lock:
        with pytest.raises(MeshwrightError, match=r"libtpu.*wait for them"):
            elsewhere(0.2)
        with compile_cache.libtpu_lock(timeout_s=0.0) as same:
            assert same is lock
        with pytest.raises(MeshwrightError):
            elsewhere(0.2)
    elsewhere(5.0)


def test_a_child_keeps_the_lock_alive():
    with compile_cache.libtpu_lock() as lock:
        child = subprocess.Popen(
            [sys.executable, "-c", "import sys; sys.stdin.read()"],
            stdin=subprocess.PIPE,
            pass_fds=(lock.fileno(),),
        )
    with pytest.raises(MeshwrightError):
        elsewhere(0.2)
    child.communicate(b"")
    elsewhere(5.0)
