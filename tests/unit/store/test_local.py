"""The folder store: a dictionary is the oracle; crashes, races and full disks are real."""

from __future__ import annotations

import shutil
import signal
import subprocess
import sys
import tempfile
import textwrap
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cat_cluster.errors import ObjectExistsError, ObjectNotFoundError, StoreError
from cat_cluster.store import LocalStore

# Few keys, so that operations meet; "a" and "a-b" share a beginning, folders and objects have names of their own.
KEYS = st.sampled_from(["a/x", "a/y", "a-b/x", "a/c/z", "b", "b-1"])
STEPS = st.lists(
    st.one_of(
        st.tuples(st.just("put"), KEYS, st.binary(max_size=20)),
        st.tuples(st.just("once"), KEYS, st.binary(max_size=20)),
        st.tuples(st.just("delete"), KEYS, st.just(b"")),
    ),
    max_size=20,
)


PREFIXES = ["", "a", "a/", "a-", "a/c/z", "b", "none/"]
AFTER = ["", "a", "a-b/x", "a/", "a/c/~", "a/x", "a~", "b", "c"]


@given(STEPS, st.sampled_from(PREFIXES), st.sampled_from(AFTER))
@settings(max_examples=60, deadline=None)
def test_it_behaves_as_a_dictionary(steps: list[tuple[str, str, bytes]], prefix: str, after: str) -> None:
    with tempfile.TemporaryDirectory() as folder:
        store, oracle = LocalStore(folder), dict[str, bytes]()
        for action, key, data in steps:
            if action == "delete":
                store.delete(key)
                oracle.pop(key, None)
            elif action == "once" and key in oracle:
                with pytest.raises(ObjectExistsError, match="write-once"):
                    store.put(key, data, if_absent=True)
            else:
                store.put(key, data, if_absent=action == "once")
                oracle[key] = data
        assert {key: store.get(key) for key in store.list("")} == oracle
        wanted = sorted(key for key in oracle if key.startswith(prefix))
        assert store.list(prefix) == wanted
        assert [entry.key for entry in store.entries(prefix, after=after)] == [key for key in wanted if key > after]
        assert all(store.exists(key) and store.size(key) == len(data) for key, data in oracle.items())


def test_an_entry_has_another_version_once_its_object_is_replaced(tmp_path: Path) -> None:
    store = LocalStore(tmp_path)

    def versions() -> dict[str, str]:
        return {entry.key: entry.version for entry in store.entries("")}

    store.put("a/x", b"1")
    store.put("a/y", b"1")
    first = versions()
    assert versions() == first
    store.put("a/x", b"2")
    assert versions()["a/x"] != first["a/x"]
    assert versions()["a/y"] == first["a/y"]
    (tmp_path / "a" / "link").symlink_to("y")  # what is put in the place of a file by hand
    (tmp_path / "a" / "lost").symlink_to("nothing")
    linked = versions()["a/link"]
    store.put("a/y", b"2")
    assert versions()["a/link"] != linked
    assert store.list("") == ["a/link", "a/lost", "a/x", "a/y"]


@pytest.mark.parametrize("key", ["absent", "folder", "folder/object/below"])
def test_reading_what_is_no_object_names_the_key(tmp_path: Path, key: str) -> None:
    store = LocalStore(tmp_path)
    store.put("folder/object", b"1")
    assert not store.exists(key)
    for read in (store.get, store.size):
        with pytest.raises(ObjectNotFoundError, match=key):
            read(key)


@pytest.mark.parametrize("key", ["../outside", "/outside", "a/../../outside", ".tmp-1"])
def test_no_key_leaves_the_folder_or_names_a_hidden_file(tmp_path: Path, key: str) -> None:
    store = LocalStore(tmp_path / "store")
    for use in (store.get, store.exists, store.delete, store.size, store.list, lambda k: store.put(k, b"1")):
        with pytest.raises(StoreError, match="storage key"):
            use(key)
    assert list(tmp_path.iterdir()) == []


def test_a_symbolic_link_out_of_the_folder_is_refused(tmp_path: Path) -> None:
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "secret").write_text("x")
    store = LocalStore(tmp_path / "store")
    store.put("a", b"1")
    (store.folder / "link").symlink_to(outside)
    for use in (store.get, store.delete, lambda k: store.put(k, b"1")):
        with pytest.raises(StoreError, match="symbolic link"):
            use("link/secret")
    assert (outside / "secret").read_text() == "x"


def test_an_object_cannot_be_a_folder_too(tmp_path: Path) -> None:
    store = LocalStore(tmp_path)
    store.put("a", b"1")
    with pytest.raises(StoreError, match="cannot write a/b"):
        store.put("a/b", b"2")
    assert store.get("a") == b"1"


def test_a_read_only_folder_is_explained() -> None:
    """Root may write anywhere, so the child becomes nobody first."""
    script = """
        import os, sys
        from cat_cluster.store import LocalStore
        if os.geteuid() == 0:
            os.setuid(65534)
        LocalStore(sys.argv[1]).put("a", b"1")
    """
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name) / "store"
        folder.mkdir()
        folder.chmod(0o555)
        Path(name).chmod(0o755)
        done = run_python(script, folder, check=False)
        assert done.returncode == 1
        assert "check the permissions" in done.stderr.splitlines()[-1]


def run_python(script: str, *arguments: object, check: bool = True) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", textwrap.dedent(script), *map(str, arguments)]
    return subprocess.run(command, check=check, capture_output=True, text=True, timeout=120)


def test_a_process_killed_in_the_middle_of_a_put_leaves_nothing_visible(tmp_path: Path) -> None:
    LocalStore(tmp_path).put("objects/old", b"old")
    script = """
        import os, signal, sys
        from cat_cluster.store import LocalStore
        os.fsync = lambda descriptor: os.kill(os.getpid(), signal.SIGKILL)   # the data is written, the name is not
        LocalStore(sys.argv[1]).put(sys.argv[2], b"new" * 100_000, if_absent=sys.argv[3] == "once")
    """
    for key, mode in (("objects/new", "once"), ("objects/old", "replace")):
        assert run_python(script, tmp_path, key, mode, check=False).returncode == -signal.SIGKILL
    store = LocalStore(tmp_path)
    assert len(list(tmp_path.glob("objects/.tmp-*"))) == 2
    assert store.list("") == ["objects/old"]
    assert store.get("objects/old") == b"old"
    store.put("objects/new", b"again", if_absent=True)
    assert store.get("objects/new") == b"again"


FULL_DISK = """
    import sys
    from cat_cluster.errors import ObjectNotFoundError, StoreError
    from cat_cluster.store import LocalStore
    if sys.argv[2] == "limit":
        import resource
        resource.setrlimit(resource.RLIMIT_FSIZE, (65536, 65536))
    store = LocalStore(sys.argv[1])
    store.put("small", b"1")
    for once in (False, True):
        for key in ("big", "folder/big", "small"):
            try:
                store.put(key, bytes(1_000_000), if_absent=once)
                sys.exit("the put went through")
            except StoreError as error:
                print(error)
    assert store.list("") == ["small"] and store.get("small") == b"1"
    left = [path.name for path in store.folder.rglob("*") if path.is_file()]
    assert left == ["small"], left
    store.put("after", b"2")
    assert store.get("after") == b"2"
"""


def assert_explains_full_disk(output: str, folder: Path) -> None:
    lines = output.splitlines()
    assert len(lines) == 6
    for line in lines:
        assert f"free 1.0 MB or more on the disk of {folder}" in line
        assert "nothing of this object was stored" in line


def test_a_put_beyond_the_file_size_limit_leaves_nothing(tmp_path: Path) -> None:
    assert_explains_full_disk(run_python(FULL_DISK, tmp_path, "limit").stdout, tmp_path)


def test_a_full_disk_leaves_nothing(tmp_path: Path) -> None:
    """A file system of 64 KiB, mounted in a namespace of its own where the machine allows it."""
    mount = 'mount -t tmpfs -o size=64k none "$1" && shift && exec "$@"'
    unshare = shutil.which("unshare")
    if unshare is None or subprocess.run([unshare, "-Urm", "sh", "-c", mount, "-", str(tmp_path), "true"]).returncode:
        pytest.skip("this machine lets no user mount a file system; the file size limit stands in for it")
    shell = [unshare, "-Urm", "sh", "-c", mount, "-", str(tmp_path)]
    command = [*shell, sys.executable, "-c", textwrap.dedent(FULL_DISK), str(tmp_path), "disk"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert_explains_full_disk(done.stdout, tmp_path)
    assert "No space left on device" in done.stdout


def test_of_two_processes_that_write_once_exactly_one_wins(tmp_path: Path) -> None:
    script = """
        import sys
        from cat_cluster.errors import ObjectExistsError
        from cat_cluster.store import LocalStore
        store, name, won = LocalStore(sys.argv[1]), sys.argv[2], []
        print("ready", flush=True)
        sys.stdin.readline()
        for number in range(200):
            try:
                store.put(f"race/{number}", name.encode(), if_absent=True)
                won.append(number)
            except ObjectExistsError:
                pass
        print(*won)
    """
    command = [sys.executable, "-c", textwrap.dedent(script), str(tmp_path)]
    racers = {
        name: subprocess.Popen([*command, name], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        for name in ("left", "right")
    }
    for racer in racers.values():
        assert racer.stdout is not None
        assert racer.stdout.readline() == "ready\n"
    for racer in racers.values():
        assert racer.stdin is not None
        racer.stdin.write("go\n")
        racer.stdin.flush()
    won = {name: {int(word) for word in racer.communicate(timeout=120)[0].split()} for name, racer in racers.items()}
    assert won["left"] | won["right"] == set(range(200))
    assert not won["left"] & won["right"]
    store = LocalStore(tmp_path)
    assert all(store.get(f"race/{number}") == name.encode() for name, numbers in won.items() for number in numbers)
