"""No test reads the profile of the user who runs it."""

import pytest


@pytest.fixture(autouse=True)
def no_profile(tmp_path_factory, monkeypatch):
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path_factory.mktemp("config")))
    monkeypatch.delenv("SPKNET_CLUSTER", raising=False)
