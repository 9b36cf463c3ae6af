"""The download command as a process: killed and started again, and with secrets that nobody else may read."""

import base64
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

from tests.tools.test_voxceleb_download import Server, made
from tools.voxceleb import __main__ as voxceleb

REPOSITORY = Path(__file__).resolve().parents[2]


def parts_of_vox1(tmp_path, size):
    names = {f"vox1_dev_wav_parta{letter}": size for letter in "abcd"}
    files, md5s = made(**names)
    lines = [f"{md5}  {name}" for name, md5 in md5s.items()] + [f"{'1' * 32}  vox1_dev_wav.zip"]
    (tmp_path / "checksums.txt").write_text("\n".join(lines) + "\n")
    return files


def start(tmp_path, *arguments, **environment):
    command = [sys.executable, "-m", "tools.voxceleb", *arguments, "--save_path", str(tmp_path / "data")]
    command += ["--checksums", str(tmp_path / "checksums.txt")]
    with open(tmp_path / "log.txt", "ab") as log:
        return subprocess.Popen(command, cwd=REPOSITORY, env=os.environ | environment, stdout=log, stderr=log)


def test_killed_download_goes_on_where_it_was(tmp_path):
    files = parts_of_vox1(tmp_path, 400_000)
    with Server(files, rate=600_000) as server:
        for _ in range(2):
            begun = server.sent
            process = start(tmp_path, "download", "--base-url", server.url)
            while server.sent < begun + 400_000:
                assert process.poll() is None, (tmp_path / "log.txt").read_text()
                time.sleep(0.01)
            process.send_signal(signal.SIGKILL)
            process.wait()
        server.rate = None
        assert start(tmp_path, "download", "--base-url", server.url).wait() == 0
        assert {name: (tmp_path / "data" / name).read_bytes() for name in files} == files
        # Each kill may lose what lay in the sockets and in Python's buffers, not what had been written.
        assert server.sent < 1_600_000 + 2 * 4 * 200_000
        assert any(asked not in ("bytes=0-0", "bytes=0-") for _, asked, _, _ in server.requests)


def test_password_is_in_no_command_line_no_log_no_file(tmp_path):
    files = parts_of_vox1(tmp_path, 100_000)
    token = "Basic " + base64.b64encode(b"me:hush-hush").decode()
    with Server(files, auth=token, rate=100_000) as server:
        # The seed's flags, as they are.
        process = start(tmp_path, "--download", "--user", "me", "--password", "hush-hush", VOXCELEB_URL=server.url)
        while not any(asked == "bytes=0-" for _, asked, _, _ in server.requests):
            assert process.poll() is None, (tmp_path / "log.txt").read_text()
            time.sleep(0.01)
        title = Path(f"/proc/{process.pid}/cmdline").read_text()
        assert "hush" not in title and "--download" in title
        assert process.wait() == 0, (tmp_path / "log.txt").read_text()
        assert all(given == token for _, _, given, _ in server.requests)
    assert {name: (tmp_path / "data" / name).read_bytes() for name in files} == files
    texts = [path for path in tmp_path.rglob("*") if path.is_file() and path.name not in files]
    assert len(texts) == 6 and not any(b"hush" in path.read_bytes() for path in texts)


def test_secrets_leave_the_arguments_and_then_the_environment(tmp_path, capsys):
    environ = {}
    left = voxceleb.hide_secrets(["python", "--key=K", "--user", "U", "-x", "--password", "P"], environ)
    assert left == ["python", "-x"]
    assert environ == {"VOXCELEB_KEY": "K", "VOXCELEB_USER": "U", "VOXCELEB_PASSWORD": "P"}
    assert voxceleb.main(["download", "--save_path", str(tmp_path), "--key", "K"]) == 2
    assert "give --base-url or set VOXCELEB_URL" in capsys.readouterr().err and "VOXCELEB_KEY" not in os.environ
