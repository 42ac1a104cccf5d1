from __future__ import annotations

import http.client
import json
from urllib.parse import urlsplit

import pytest
from soak.platform import Mood, Platform


def post(platform: Platform, timeout: float = 5.0) -> int:
    """Send one event; its status."""
    port = urlsplit(platform.environ["DATAROBOT_ENDPOINT"]).port
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=timeout)
    try:
        connection.request("POST", "/api/v2/remoteEvents/", json.dumps({"title": "Engine restarted"}))
        return connection.getresponse().status
    finally:
        connection.close()


def test_moods() -> None:
    with Platform() as platform:
        assert post(platform) == 200
        platform.mood = Mood.ERROR
        assert post(platform) == 500
        platform.mood = Mood.RUDE
        with pytest.raises(http.client.RemoteDisconnected):
            post(platform)
        platform.mood = Mood.SILENT
        with pytest.raises(TimeoutError):
            post(platform, timeout=0.2)
        assert platform.taken == {"Engine restarted": 1}
