"""The page, driven by a real browser (chromium), and what its server refuses, asked by plain sockets.

python -m tests.use.test_page runs/a a.flac b.flac docs/pictures/page.png     the picture in docs/use.md
"""

import contextlib
import http.client
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
from playwright.sync_api import expect, sync_playwright

import spknet
from spknet import cli
from spknet.checkpoints import card as cards
from spknet.config import LossConfig, ModelConfig
from tests.checkpoints.test_voxceleb_trainer import own_checkpoint
from tests.conftest import RATE, voice

ROOT = Path(__file__).resolve().parents[2]
PATIENCE = 120_000  # ms that the browser waits for what it expects: the machine may be busy


@contextlib.contextmanager
def served(checkpoint: str, folder: Path, *words: str):
    """The address of `spknet page` in a process of its own, whose temporary files lie below `folder`."""
    command = [sys.executable, "-m", "spknet", "page", checkpoint, "--port", "0", *words]
    environment = os.environ | {"TMPDIR": str(folder), "PYTHONPATH": str(ROOT)}
    process = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, text=True)
    try:
        address = process.stdout.readline().split()[0]
        yield address
    finally:
        process.send_signal(signal.SIGINT)
        assert process.wait(timeout=60) == 0


@contextlib.contextmanager
def browser_page(address: str, *flags: str):
    """(page of a chromium, addresses that it asked for)."""
    with sync_playwright() as playwright:
        path = shutil.which("chromium")
        assert path, "chromium is needed (Debian: package chromium)"
        chromium = playwright.chromium.launch(executable_path=path, args=["--no-sandbox", *flags])
        page = chromium.new_page(viewport={"width": 900, "height": 780})
        page.set_default_timeout(PATIENCE)
        asked = []
        page.on("request", lambda request: asked.append(request.url))
        page.goto(address)
        expect(page.locator("#network")).not_to_be_empty(timeout=PATIENCE)
        yield page, asked
        chromium.close()


def drop(page, *paths: Path) -> None:
    """Drops files on the page, one event for all of them."""
    contents = [[path.name, path.read_bytes().hex()] for path in paths]
    page.evaluate(
        """(files) => {
          const data = new DataTransfer();
          for (const [name, hex] of files)
            data.items.add(new File([Uint8Array.from(hex.match(/../g) || [], (byte) => parseInt(byte, 16))], name));
          document.getElementById("drop").dispatchEvent(new DragEvent("drop", { dataTransfer: data }));
        }""",
        contents,
    )


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> str:
    """A network with a card: same from a cosine of 0.9 on."""
    path = tmp_path_factory.mktemp("page") / "a.pt"
    torch.manual_seed(0)
    model, _ = own_checkpoint(path, ModelConfig(width=0.25, embedding_size=16), LossConfig(), ["ann", "bob"])
    edges = np.linspace(0.5, 1, 26)
    bump = lambda centre: np.round(90 * np.exp(-(((edges[1:] - centre) / 0.05) ** 2))).astype(int).tolist()  # noqa: E731
    cards.write(
        cards.place(path),
        cards.Card(
            calibration=cards.Calibration(40.0, -36.0),
            target_prior=0.5,
            threshold=0.9,
            histogram=cards.Histogram(edges.tolist(), bump(0.95), bump(0.75)),
            false_alarm_thresholds=[],
            lists=[],
            network={},
            provenance={"weights_sha256": cards.weights_digest(model.state_dict())},
        ),
    )
    return str(path)


@pytest.fixture(scope="module")
def voices(tmp_path_factory) -> list[Path]:
    """Four voices of 1.5 s; the last one's name is a trap."""
    folder = tmp_path_factory.mktemp("voices")
    paths = [folder / name for name in ("ann.wav", "bob.wav", "cid.wav", "<img src=x onerror=document.title=1>.wav")]
    for number, path in enumerate(paths):
        soundfile.write(path, voice(number, 0, 1.5), RATE, subtype="PCM_16")
    return paths


@pytest.fixture(scope="module")
def address(checkpoint, tmp_path_factory):
    folder = tmp_path_factory.mktemp("temporary")
    with served(checkpoint, folder) as at:
        yield at
        (own,) = folder.iterdir()
        assert own.name.startswith("spknet-page-") and list(own.iterdir()) == []  # recordings are gone
    assert list(folder.iterdir()) == []


def test_two_dropped_files_make_the_verdict_that_python_gives(address, checkpoint, voices, tmp_path):
    with browser_page(address) as (page, asked):
        drop(page, voices[0], voices[1])
        expect(page.locator("#answer")).not_to_be_empty(timeout=PATIENCE)
        verdict = spknet.load(checkpoint, "cpu").verify(*voices[:2])
        assert page.locator("#answer").inner_text() == ("the same speaker" if verdict.same else "different speakers")
        figures = (
            f"score {verdict.score:.3f} · probability of one speaker {verdict.probability:.3f} · same from 0.900 on"
        )
        assert page.locator("#figures").inner_text() == figures
        assert page.locator(".recording canvas").count() == 2 and page.locator("#histogram").is_visible()
        for canvas in ("#histogram", ".recording canvas >> nth=1"):  # something is drawn
            drawn = "c => c.getContext('2d').getImageData(0, 0, c.width, c.height).data.some((value) => value)"
            assert page.locator(canvas).evaluate(drawn)
        page.locator("#clear").click()
        drop(page, voices[0], voices[0])
        expect(page.locator("#answer")).to_have_text("the same speaker", timeout=PATIENCE)
        page.screenshot(path=tmp_path / "page.png", full_page=True)
        assert (tmp_path / "page.png").stat().st_size > 10_000
        assert asked and all(url.startswith(address + "/") for url in asked)


def test_several_files_make_a_map_and_a_hostile_name_is_text(address, voices):
    with browser_page(address) as (page, _):
        page.locator("#files").set_input_files(voices)
        expect(page.locator("#map")).to_be_visible(timeout=PATIENCE)
        expect(page.locator(".recording")).to_have_count(4, timeout=PATIENCE)
        assert page.locator(".recording b").all_inner_texts() == [path.name for path in voices]
        assert page.locator("img").count() == 0 and page.title() == "spknet: whose voice is it?"
        assert not page.locator("#verdict").is_visible()


def test_the_microphone_is_recorded(address, voices, tmp_path):
    spoken = tmp_path / "spoken.wav"
    soundfile.write(spoken, np.tile(voice(1, 0, 3.0), 4), RATE, subtype="PCM_16")
    fake = ["--use-fake-ui-for-media-stream", "--use-fake-device-for-media-stream"]
    with browser_page(address, *fake, f"--use-file-for-fake-audio-capture={spoken}") as (page, _):
        page.locator("#record").click()
        expect(page.locator("#record")).to_have_text("stop", timeout=PATIENCE)
        page.wait_for_timeout(2500)
        page.locator("#record").click()
        expect(page.locator(".recording b")).to_have_text("recording 1.wav", timeout=PATIENCE)
        seconds = float(page.locator(".recording .about").inner_text().split()[0])
        assert seconds > 0.5 and "silent" not in page.locator(".recording").inner_text()


def test_what_odd_files_are_told(address, tmp_path):
    soundfile.write(tmp_path / "silent.wav", np.zeros(RATE), RATE, subtype="PCM_16")
    soundfile.write(tmp_path / "short.wav", voice(0, 0, 0.01), RATE, subtype="PCM_16")
    (tmp_path / "empty.wav").write_bytes(b"")
    (tmp_path / "letter.wav").write_text("Dear Sir or Madam,\n" * 20)
    with open(tmp_path / "huge.wav", "wb") as file:
        file.truncate(2 * 2**30)  # no byte of it is on the disk
    said = {
        "silent.wav": "silent.wav is silent",
        "short.wav": "short.wav is too short: 0.01 s",
        "empty.wav": "empty.wav is empty: it has no bytes",
        "letter.wav": "letter.wav: ",
        "huge.wav": "huge.wav: larger than 200 MiB, the limit of an upload",
    }
    with browser_page(address) as (page, asked):
        for name, expected in said.items():
            page.locator("#files").set_input_files(tmp_path / name)
            where = page.locator(".recording .doubt" if name in ("silent.wav", "short.wav") else "#said")
            expect(where.filter(has_text=expected).first).to_be_visible(timeout=PATIENCE)
        assert str(tmp_path) not in page.content() and "spknet-page-" not in page.content()
        assert not any("huge" in url for url in asked)


def ask(address: str, method: str, path: str, body=None, **headers: str) -> tuple[int, dict | str]:
    """Status and content of an answer."""
    line = http.client.HTTPConnection(address.removeprefix("http://"), timeout=120)
    line.request(method, path, body, headers)
    answer = line.getresponse()
    text = answer.read().decode()
    return answer.status, json.loads(text) if answer.headers.get_content_type() == "application/json" else text


def test_two_gigabytes_are_refused_before_a_byte_of_them_is_sent(address):
    host, port = address.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port)), timeout=120) as line:
        head = f"POST /recording?name=a.wav HTTP/1.1\r\nHost: {host}:{port}\r\nContent-Length: {2 * 2**30}\r\n\r\n"
        line.sendall(head.encode())
        said = b""
        while part := line.recv(4096):  # the server closes by itself
            said += part
    assert said.startswith(b"HTTP/1.1 413 ") and b"larger than 200 MiB" in said


def test_an_upload_without_a_length_is_cut_at_the_limit(checkpoint, tmp_path):
    with served(checkpoint, tmp_path, "--max_mb", "1") as address:
        sent = []

        def parts():
            for _ in range(64):
                sent.append(1)
                yield bytes(2**20)

        with contextlib.suppress(BrokenPipeError, ConnectionResetError):
            status, content = ask(address, "POST", "/recording?name=a.wav", parts())
            assert status == 413 and "larger than 1 MiB" in content["error"]
        assert len(sent) < 64 or status == 413
        assert sum(path.stat().st_size for path in tmp_path.rglob("*") if path.is_file()) == 0


def test_other_sites_and_other_names_of_the_host_are_refused(address, voices):
    body = voices[0].read_bytes()
    assert ask(address, "POST", "/recording?name=a.wav", body, Origin="http://evil.example")[0] == 403
    assert ask(address, "GET", "/about", Host="evil.example")[0] == 400
    status, content = ask(address, "POST", "/recording?name=a.wav", body, Origin=address)
    assert status == 200 and len(content["vector"]) == 16 and len(content["wave"]) == 150
    assert ask(address, "GET", "/../../etc/passwd")[0] == 404
    assert not re.search(r"https?://", ask(address, "GET", "/")[1] + ask(address, "GET", "/page.js")[1])


@pytest.mark.parametrize(
    "given, said",
    [
        ("{", "expected JSON with `recordings`"),
        ('{"recordings": [1, 2]}', "expected recordings with name, vector and rate"),
        ('{"recordings": [{"name": "a", "vector": [1], "rate": 16000}]}', "expected 2 to 200 embeddings of 16"),
    ],
)
def test_scores_of_what_is_no_recording(address, given, said):
    status, content = ask(address, "POST", "/scores", given)
    assert status in (400, 422) and said in content["error"]


def test_no_page_without_its_packages(checkpoint, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "uvicorn", None)
    assert cli.main(["page", checkpoint]) == 2
    assert "pip install 'spknet[page]'" in capsys.readouterr().err


@pytest.mark.parametrize("port", ["65536", "-1", "http"])
def test_what_is_no_port_is_refused(port, checkpoint, capsys):
    with pytest.raises(SystemExit):
        cli.main(["page", checkpoint, f"--port={port}"])
    assert "expected a port, 0 to 65535" in capsys.readouterr().err


def picture(checkpoint: str, *paths: str) -> None:
    """The last path is written: the page after the others have been dropped."""
    *recordings, out = map(Path, paths)
    folder = Path(f"/tmp/spknet-picture-{time.time_ns()}")
    folder.mkdir()
    with served(checkpoint, folder) as address, browser_page(address) as (page, _):
        drop(page, *recordings)
        expect(page.locator("#answer")).not_to_be_empty(timeout=PATIENCE)
        page.screenshot(path=out, full_page=True)
    folder.rmdir()


if __name__ == "__main__":
    picture(*sys.argv[1:])
