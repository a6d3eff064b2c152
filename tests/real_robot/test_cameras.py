from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import cv2
import numpy as np
import pytest

from real_robot.cameras import Camera, CameraConfig, CameraError, FrameSource, OpenCVSource
from vla_rl.runtime.config import decode
from vla_rl.runtime.errors import UserError

WIDTH, HEIGHT = 32, 24
PATIENCE_S = 5.0  # of a test with a thread; nothing waits so long unless it fails
AT_ONCE_S = 1.0  # what never blocks takes a thousandth of it; the rest is for a busy machine


class FakeSource:
    """Delivers what the test puts in, and blocks while there is nothing."""

    def __init__(self) -> None:
        self.images: queue.Queue[np.ndarray | Exception | None] = queue.Queue()
        self.released = threading.Event()

    def put(self, value: int, width: int = WIDTH) -> None:
        self.images.put(np.full((HEIGHT, width, 3), value, np.uint8))

    def read(self) -> np.ndarray | None:
        image = self.images.get()
        if isinstance(image, Exception):
            raise image
        return image

    def release(self) -> None:
        self.released.set()


def config(**options: float) -> CameraConfig:
    fast = {"open_timeout_s": PATIENCE_S, "stale_s": PATIENCE_S, "close_timeout_s": 0.2}
    return CameraConfig(source="fake", width=WIDTH, height=HEIGHT, **(fast | options))  # type: ignore[arg-type]


@pytest.fixture
def source() -> Iterator[FakeSource]:
    made = FakeSource()
    yield made
    made.images.put(None)  # lets the thread go


def opened(source: FakeSource, **options: float) -> Camera:
    return Camera(config(**options), lambda _: source)


def until(is_so: Callable[[], bool]) -> None:
    end_s = time.monotonic() + PATIENCE_S
    while not is_so():
        assert time.monotonic() < end_s
        time.sleep(0.002)


def failure(camera: Camera) -> str:
    """What ``newest`` comes to say."""
    end_s = time.monotonic() + PATIENCE_S
    while time.monotonic() < end_s:
        try:
            camera.newest()
        except CameraError as error:
            return str(error)
        time.sleep(0.002)
    raise AssertionError("the camera has not failed")


def test_a_slow_reader_gets_the_newest_frame_and_no_queue(source: FakeSource) -> None:
    with_frames = opened(source)
    for value in range(1, 51):
        source.put(value)
    assert with_frames.wait(after=49).number == 50
    for _ in range(3):  # reading takes nothing away, and brings nothing older up
        frame = with_frames.newest()
        assert frame is not None
        assert frame.number == 50
        assert (frame.rgb_HW3 == 50).all()
    with_frames.close()


def test_numbers_run_on_and_times_are_those_of_receiving(source: FakeSource) -> None:
    camera = opened(source)
    before_s, number = time.monotonic(), 0
    for value in range(1, 6):
        source.put(value)
        frame = camera.wait(after=number)
        assert frame.number == number + 1 == value
        assert before_s <= frame.received_s <= time.monotonic()
        before_s, number = frame.received_s, frame.number
    camera.close()


def test_a_source_that_blocks_does_not_block_its_reader(source: FakeSource) -> None:
    camera = opened(source)
    start_s = time.monotonic()
    assert camera.newest() is None  # nothing has come yet
    source.put(7)
    camera.wait()
    for _ in range(1000):
        frame = camera.newest()
        assert frame is not None
        assert frame.number == 1
    assert time.monotonic() - start_s < PATIENCE_S / 2
    camera.close()


def test_an_opening_that_blocks_does_not_block_and_is_reported() -> None:
    go = threading.Event()
    late = FakeSource()

    def open_late(_: CameraConfig) -> FrameSource:
        go.wait()
        return late

    camera = Camera(config(open_timeout_s=0.3), open_late)
    assert camera.newest() is None
    assert "no frame in the 0.3 s" in failure(camera)
    start_s = time.monotonic()
    camera.close()
    assert time.monotonic() - start_s < 0.2 + AT_ONCE_S
    go.set()
    assert late.released.wait(PATIENCE_S)  # what opens after all is let go of


def test_closing_takes_bounded_time_though_the_source_blocks_and_twice_is_once(source: FakeSource) -> None:
    camera = opened(source)
    source.put(1)
    camera.wait()
    start_s = time.monotonic()
    camera.close()
    assert time.monotonic() - start_s < 0.2 + AT_ONCE_S
    assert not source.released.is_set()  # only its own thread touches the device
    camera.close()
    with pytest.raises(CameraError, match="closed"):
        camera.newest()
    source.put(2)
    assert source.released.wait(PATIENCE_S)
    camera.close()


def test_a_closed_camera_has_let_go_of_the_device(source: FakeSource) -> None:
    source.put(1)
    with opened(source, close_timeout_s=PATIENCE_S) as camera:
        assert camera.newest() is not None
        camera._stop.set()
        source.put(2)
    assert source.released.is_set()
    assert not camera._thread.is_alive()


def test_a_source_that_stops_delivering_is_stale_until_it_delivers_again(source: FakeSource) -> None:
    source.put(1)
    camera = opened(source, stale_s=0.4)
    camera.wait()
    assert "no frame for" in failure(camera)
    with pytest.raises(CameraError, match=r"allowed are 0\.4 s"):
        camera.wait(after=1)
    source.put(2)
    until(lambda: camera._frame is not None and camera._frame.number == 2)
    frame = camera.newest()
    assert frame is not None
    assert frame.number == 2
    camera.close()


@pytest.mark.parametrize(
    ("end", "words"),
    [
        (None, "stopped delivering"),
        (OSError("no such device"), "no such device"),
        (cv2.error("select() timeout"), "timeout"),
        (KeyError("a mistake in a source"), "broke off"),
    ],
    ids=lambda v: type(v).__name__,
)
@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_a_source_that_dies_is_reported_at_once_and_for_good(
    source: FakeSource, end: Exception | None, words: str
) -> None:
    source.put(1)
    camera = opened(source)
    camera.wait()
    source.images.put(end)
    said = failure(camera)
    assert words in said
    assert "'fake'" in said
    assert "\n" not in said
    assert source.released.wait(PATIENCE_S)
    with pytest.raises(CameraError, match="fake"):
        camera.wait(after=1)
    camera.close()
    assert failure(camera) == said  # the cause is not covered up by the closing


def test_equal_images_are_frozen_only_if_that_is_looked_at(source: FakeSource) -> None:
    def feed() -> None:
        for _ in range(100):
            source.put(5)
            time.sleep(0.005)

    feeder = threading.Thread(target=feed)
    feeder.start()
    camera = opened(source, frozen_s=0.25)
    assert "frozen" in failure(camera)
    feeder.join()
    until(source.images.empty)
    source.put(6)
    until(lambda: camera._frame is not None and bool((camera._frame.rgb_HW3 == 6).all()))
    assert camera.newest() is not None
    camera.close()
    still = FakeSource()
    for _ in range(5):
        still.put(5)
    patient = opened(still)
    assert patient.wait(after=4).number == 5
    patient.close()
    still.images.put(None)


def test_another_size_than_asked_for_is_refused_with_both(source: FakeSource) -> None:
    source.put(1, width=WIDTH + 8)
    with pytest.raises(CameraError, match=r"40 x 24 x 3.*32 x 24"), opened(source):
        pass
    assert source.released.wait(PATIENCE_S)
    grey = FakeSource()
    grey.images.put(np.zeros((HEIGHT, WIDTH), np.uint8))
    assert "32 x 24 uint8" in failure(opened(grey))


def test_no_frame_in_time_is_reported(source: FakeSource) -> None:
    camera = opened(source)
    with pytest.raises(CameraError, match=r"no new frame in 0\.05 s"):
        camera.wait(timeout_s=0.05)
    camera.close()


def test_a_frame_cannot_be_written_to(source: FakeSource) -> None:
    source.put(1)
    with opened(source) as camera:
        frame = camera.newest()
        assert frame is not None
        with pytest.raises(ValueError, match="read-only"):
            frame.rgb_HW3[0, 0, 0] = 9


@pytest.fixture(scope="module")
def video(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Ten red frames at 50 Hz."""
    path = tmp_path_factory.mktemp("video") / "red.avi"
    writer = cv2.VideoWriter(str(path), cv2.VideoWriter.fourcc(*"MJPG"), 50.0, (64, 48))
    for _ in range(10):
        writer.write(np.full((48, 64, 3), (0, 0, 255), np.uint8))  # OpenCV writes BGR
    writer.release()
    return path


def test_a_video_file_is_red_green_blue_and_played_at_its_pace(video: Path) -> None:
    frames = []
    with Camera(CameraConfig(str(video), 64, 48)) as camera, pytest.raises(CameraError, match="stopped delivering"):  # noqa: PT012
        while True:
            frames.append(camera.wait(after=frames[-1].number if frames else 0))
    colour = frames[0].rgb_HW3.reshape(-1, 3).mean(axis=0)
    assert colour[0] > 240
    assert colour[1:].max() < 15
    played = frames[-1].number - frames[0].number
    assert played >= 4  # 9, were it not for a busy machine
    assert frames[-1].received_s - frames[0].received_s > 0.5 * played / 50.0


def test_a_video_of_another_size_is_refused(video: Path) -> None:
    with pytest.raises(CameraError, match=r"64 x 48 x 3.*640 x 480"), Camera(CameraConfig(str(video))):
        pass


@pytest.mark.parametrize("name", ["nothing.avi", "text.avi"])
def test_what_cannot_be_opened_is_reported(name: str, tmp_path: Path) -> None:
    (tmp_path / "text.avi").write_text("no video")
    with pytest.raises(CameraError, match=f"cannot open camera .*{name}"), Camera(CameraConfig(str(tmp_path / name))):
        pass
    with pytest.raises(CameraError, match="cannot open"):
        OpenCVSource(CameraConfig(str(tmp_path / name)))


def test_a_config_is_read_and_checked() -> None:
    assert decode(CameraConfig, {"source": 0}).source == 0
    assert decode(CameraConfig, {"source": "/dev/video2", "fps": 30}).source == "/dev/video2"
    for bad in (
        {"width": 0},
        {"stale_s": 0},
        {"frozen_s": -1},
        {"fps": float("nan")},
        {"open_timeout_s": float("inf")},
    ):
        with pytest.raises(UserError, match=next(iter(bad)) if "width" not in bad else "0 x 480"):
            decode(CameraConfig, {"source": 0, **bad})
