"""The page that shows the memory, in a browser: the trace's numbers, the link under the pointer, no network."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from dnc_triton import DNC
from dnc_triton.trace import Trace

pytest.importorskip("plotly", reason="Plotly draws the page")
from dnc_triton.viewer import WRITTEN, bit_symbols, write_page

STEPS, SLOTS, READS, WRITES = 6, 7, 2, 2
# What a page could trip over: the end of a script, tags, a placeholder of the template, several lines, none.
SYMBOLS = {
    "inputs": ["</script>", "<b>x</b>", "{{title}}", "■\n·\n■", "&amp; ä", ""],
    "targets": ["", "a", "b", "c", "", "d"],
    "outputs": ["z", "a", "wrong", "c", "<i>", "d"],
}
TITLE = "A <title> & {{data}}"


def make_trace(batch: int = 2, steps: int = STEPS) -> Trace:
    torch.manual_seed(0)
    dnc = DNC(3, 8, 2, memory_size=SLOTS, word_size=4, num_reads=READS, num_writes=WRITES)
    with torch.no_grad():
        dnc.interface.weight.mul_(8)  # so that slots are told apart
        _, _, trace = dnc(torch.randn(batch, steps, 3), trace=True)
    return trace


# --- Without a browser


def test_bit_symbols_are_columns():
    assert bit_symbols(torch.tensor([[0.9, 0.1, 0.0], [0.0, 0.0, 1.0]])) == ["■\n·\n·", "·\n·\n■"]
    assert bit_symbols(torch.zeros(0, 3)) == []
    for bits in (torch.zeros(4, 4, 3), torch.zeros(3)):
        with pytest.raises(ValueError, match=r"^bits: expected the shape \[T, channels\] of one sequence, got \["):
            bit_symbols(bits)
    with pytest.raises(TypeError, match=r"^bits: expected a tensor, got list$"):
        bit_symbols([[1, 0]])


def test_a_trace_with_its_graph_is_drawn(tmp_path):
    """As a training's own call returns it; inputs and targets likewise, in whatever dtype."""
    pytest.importorskip("matplotlib", reason="Matplotlib draws the picture")
    from dnc_triton.pictures import draw_memory

    dnc = DNC(3, 8, 2, memory_size=SLOTS, word_size=4)
    inputs, targets = torch.rand(2, STEPS, 3, requires_grad=True), torch.rand(STEPS, 2, requires_grad=True)
    _, _, trace = dnc(inputs, trace=True)
    assert trace.write_weights.requires_grad
    draw_memory(trace, inputs[0], targets, tmp_path / "memory.png")
    draw_memory(trace, inputs[0].bfloat16(), targets.bfloat16(), str(tmp_path / "again.png"))
    for name in ("memory.png", "again.png"):
        assert (tmp_path / name).read_bytes().startswith(b"\x89PNG")
    write_page(trace, tmp_path / "memory.html", **SYMBOLS, title=TITLE)
    for name, given in (("inputs", (inputs, targets)), ("targets", (inputs[0], targets[:3]))):
        with pytest.raises(ValueError, match=rf"^{name}: expected the shape \[{STEPS}, channels\] of one sequence"):
            draw_memory(trace, *given, tmp_path / "bad.png")
    for rows, steps in ((0, STEPS), (1, 0)):
        nothing = Trace(*(field[:rows, :steps] for field in trace))
        with pytest.raises(ValueError, match=rf"^trace: expected at least 1 row and 1 step, got {rows} and {steps}$"):
            draw_memory(nothing, inputs[0, :steps], targets[:steps], tmp_path / "bad.png")
    with pytest.raises(TypeError, match=r"^trace: expected a Trace, got DNCState$"):
        draw_memory(dnc(inputs)[1], inputs[0], targets, tmp_path / "bad.png")
    for name, given in (("inputs", (inputs.tolist(), targets)), ("targets", (inputs[0], None))):
        with pytest.raises(TypeError, match=f"^{name}: expected a tensor, got (list|NoneType)$"):
            draw_memory(trace, *given, tmp_path / "bad.png")
    assert not (tmp_path / "bad.png").exists()


def test_a_picture_of_a_long_sequence_is_not_too_wide(tmp_path, monkeypatch):
    """Matplotlib 3.9 refuses 65536 pixels. None is written here, which would take long."""
    pytest.importorskip("matplotlib", reason="Matplotlib draws the picture")
    from dnc_triton import pictures

    sizes = []
    monkeypatch.setattr(pictures, "_save", lambda figure, path: sizes.append(tuple(figure.get_size_inches())))
    trace = make_trace(1)
    for steps in (1, STEPS, 300, 2000, 10**5):
        long = Trace(*(field[:, :1].expand(1, steps, *field.shape[2:]) for field in trace))
        pictures.draw_memory(long, torch.zeros(steps, 3), torch.zeros(steps, 2), tmp_path / "memory.png")
    widths = [width for width, _ in sizes]
    assert widths == sorted(widths)
    assert widths[0] == pictures.LEAST_INCHES >= 6.5, "the gates' title and their legend beside it"
    assert widths[2] == pytest.approx(0.28 * 300 + 2)
    assert widths[-1] * pictures.DPI < 2**16


def test_numbers_beyond_0_and_1_have_colours_of_their_own(tmp_path, monkeypatch):
    """Such as priorities between -1 and 1, or data of one's own."""
    pytest.importorskip("matplotlib", reason="Matplotlib draws the picture")
    from dnc_triton import pictures

    figures = []
    monkeypatch.setattr(pictures, "_save", lambda figure, path: figures.append(figure))
    inputs, targets = torch.rand(STEPS, 3), torch.rand(STEPS, 2)
    inputs[0, 1], inputs[2, 0] = -0.75, torch.nan
    pictures.draw_memory(make_trace(1), inputs, targets, tmp_path / "memory.png")
    drawn = {axes.get_title(loc="left"): axes.images[0].get_clim() for axes in figures[0].axes if axes.images}
    assert drawn["input, from -0.75 to 1"] == (-0.75, 1)
    assert all(limits == (0, 1) for title, limits in drawn.items() if "from" not in title)


def test_a_long_sequence_in_a_large_memory_stays_small(tmp_path):
    """T = 100, N = 128, four read heads, and a link that is zero only on its diagonal."""
    steps, slots, reads = 100, 128, 4
    weights = partial(torch.rand, 1, steps)
    link = weights(1, slots, slots) * (1 - torch.eye(slots)) / slots
    one, several = weights(1), weights(reads)
    trace = Trace(weights(1, slots), weights(reads, slots), one, one, several, weights(reads, 3), weights(slots), link)
    words = [f"word{step}" for step in range(steps)]
    write_page(trace, tmp_path / "page.html", inputs=words, targets=words, outputs=words, title="large")
    assert (tmp_path / "page.html").stat().st_size < 10e6


@pytest.mark.parametrize("name", ["inputs", "targets", "outputs"])
def test_symbols_are_one_string_per_step(name, tmp_path):
    with pytest.raises(ValueError, match=rf"^{name}: expected 6 strings.*, got 5"):
        write_page(make_trace(), tmp_path / "page.html", **(SYMBOLS | {name: ["a"] * 5}), title="")
    with pytest.raises(TypeError, match=rf"^{name}: expected a list of strings, got \[0, 0, 0, 0, 0, 0\]"):
        write_page(make_trace(), tmp_path / "page.html", **(SYMBOLS | {name: [0] * 6}), title="")
    with pytest.raises(TypeError, match=rf"^{name}: expected a list of strings, got None"):
        write_page(make_trace(), tmp_path / "page.html", **(SYMBOLS | {name: None}), title="")
    with pytest.raises(ValueError, match=r"^wrong: expected 6 marks, one per step of the trace, got 1"):
        write_page(make_trace(), tmp_path / "page.html", **SYMBOLS, title="", wrong=[True])
    for marks in (True, "nooooo"):
        with pytest.raises(TypeError, match=rf"^wrong: expected a list of bools, got {marks!r}$"):
            write_page(make_trace(), tmp_path / "page.html", **SYMBOLS, title="", wrong=marks)
    assert not list(tmp_path.iterdir())


def test_marks_may_be_a_tensor(tmp_path: Path) -> None:
    page = tmp_path / "page.html"
    write_page(make_trace(), page, **SYMBOLS, title="", wrong=torch.tensor([True, False, False, True, False, False]))
    assert '"wrong":[true,false,false,true,false,false]' in page.read_text(encoding="utf-8")


def test_traces_that_show_nothing_are_refused(tmp_path):
    write = partial(write_page, path=tmp_path / "page.html", **SYMBOLS, title="")
    with pytest.raises(TypeError, match=r"^trace: expected a Trace, got tuple"):
        write(tuple(make_trace()))
    for batch, steps in ((0, 3), (2, 0)):
        with pytest.raises(ValueError, match=f"^trace: expected at least 1 row and 1 step, got {batch} and {steps}"):
            write(make_trace(batch, steps))
    trace = make_trace()
    trace.usage[0, 4, 2] = torch.nan
    with pytest.raises(ValueError, match=r"^trace\.usage: expected finite numbers, got others from step 4 on"):
        write(trace)
    with pytest.raises(TypeError, match=r"^title: expected a string, got int$"):
        write_page(make_trace(), tmp_path / "memory.html", **SYMBOLS, title=3)
    assert not list(tmp_path.iterdir())


# --- In a browser


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    selenium = pytest.importorskip("selenium.webdriver", reason="Selenium drives the browser")
    from selenium.webdriver.chrome.service import Service

    driver = shutil.which("chromedriver")
    binary = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if driver is None or binary is None:
        pytest.skip("Chromium and its chromedriver are not installed")
    options = selenium.ChromeOptions()
    options.binary_location = binary
    for flag in (
        "headless", "no-sandbox", "disable-gpu", "disable-quic", "no-first-run", "disable-background-networking",
        "disable-component-update", "disable-sync", "window-size=1400,1100",
        "host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1",
    ):  # fmt: skip
        options.add_argument(f"--{flag}")
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    browser = selenium.Chrome(options, Service(driver))
    yield browser
    browser.quit()


class Page:
    """The page of a trace, open in the browser."""

    def __init__(self, browser: Any, path: Path) -> None:
        self.browser = browser
        browser.get(path.as_uri())
        self.wait("document.body.dataset.ready === 'yes'")

    def run(self, expression: str) -> Any:
        return self.browser.execute_script(f"return {expression}")

    def wait(self, expression: str) -> None:
        from selenium.webdriver.support.ui import WebDriverWait

        WebDriverWait(self.browser, 60, poll_frequency=0.05).until(lambda _: self.run(expression), expression)

    def point_at(self, step: int, *, click: bool = False) -> None:
        """Move the pointer to that step in the panel of the write weights."""
        from selenium.webdriver.common.action_chains import ActionBuilder

        x, y = self.run(
            f"((box, x, y) => [box.left + x._offset + x.l2p({step}), box.top + y._offset + y._length / 2])"
            "(panels.getBoundingClientRect(), panels._fullLayout.xaxis, panels._fullLayout.yaxis4)"
        )
        actions = ActionBuilder(self.browser)
        actions.pointer_action.move_to_location(round(x) - 2, round(y)).move_to_location(round(x), round(y))
        actions.perform()
        if click:
            self.wait(f"panels._hoverdata && panels._hoverdata[0].x === {step}")  # it clicks what it hovers over
            actions = ActionBuilder(self.browser)
            actions.pointer_action.click()
            actions.perform()

    def press(self, key: str) -> None:
        from selenium.webdriver.common.action_chains import ActionChains

        ActionChains(self.browser).send_keys(key).perform()

    def shown(self) -> tuple[int, list[str], np.ndarray]:
        """The step on the right, its symbols, and its link as it is drawn: [K, N, N], rows and columns as on screen."""
        symbols = [self.run(f"document.getElementById('{name}').textContent") for name in ("input", "target", "output")]
        return int(self.run("document.getElementById('step').textContent")), symbols, self.drawn("linkPanel")

    def drawn(self, panel: str, first: int = 0, last: int | None = None) -> Any:
        """The numbers of its heat maps as they are drawn, rows from top to bottom."""
        z = self.run(f"{panel}.calcdata.slice({first}, {last or 'undefined'}).map(d => d[0].z.map(row => [...row]))")
        return np.array(z)


@pytest.fixture(scope="module")
def trace() -> Trace:
    return make_trace()


@pytest.fixture(scope="module")
def page(browser: Any, trace: Trace, tmp_path_factory: pytest.TempPathFactory) -> Page:
    """One for all tests, which leave it as they find it: held nowhere, zoomed nowhere, in the order of first writes."""
    path = tmp_path_factory.mktemp("viewer") / "page.html"
    write_page(trace, path, **SYMBOLS, title=TITLE)
    return Page(browser, path)


def first_write_order(trace: Trace) -> list[int]:
    written = (trace.write_weights[0] >= WRITTEN).any(1).tolist()
    return sorted(range(SLOTS), key=lambda slot: next((t for t in range(STEPS) if written[t][slot]), STEPS))


def test_the_page_shows_the_numbers_of_the_trace(page, trace):
    row = {name: field[0].numpy() for name, field in trace._asdict().items()}
    orders = {"number": list(range(SLOTS)), "first_write": first_write_order(trace)}
    assert orders["first_write"] != orders["number"]
    for key, order in orders.items():
        page.run(f"document.querySelector('#order option[value={key}]').selected = true")
        page.run("document.getElementById('order').dispatchEvent(new Event('change'))")
        names = ",".join(map(str, order))
        for axis in ("panels._fullLayout.yaxis5", "linkPanel._fullLayout.xaxis"):
            page.wait(f"{axis}._categories.join() === '{names}'")
        slots = [*row["write_weights"].swapaxes(0, 1), *row["read_weights"].swapaxes(0, 1), row["usage"]]
        drawn = page.drawn("panels", 3, 3 + WRITES + READS + 1)
        np.testing.assert_allclose(drawn, [weights[:, order].T for weights in slots], rtol=0, atol=0)
        page.point_at(4)
        page.wait("shown === 4")
        np.testing.assert_allclose(page.shown()[2], row["link"][4][:, order][:, :, order], rtol=0, atol=1 / 510 + 1e-6)

    gates = [row[name][:, head] for head in range(WRITES) for name in ("write_gates", "allocation_gates")]
    after = 3 + WRITES + READS + 1
    np.testing.assert_allclose(page.drawn("panels", after, after + 1)[0], gates, rtol=0, atol=0)
    np.testing.assert_allclose(page.drawn("panels", after + 1, after + 2)[0], row["free_gates"].T, rtol=0, atol=0)
    modes = page.drawn("panels", after + 2)
    np.testing.assert_allclose(modes, row["read_modes"].transpose(1, 2, 0), rtol=0, atol=0)
    titles = page.run("panels.layout.annotations.slice(-9).map(a => a.text)")
    assert titles == [
        "Write weights, head 1", "Write weights, head 2", "Read weights, head 1", "Read weights, head 2", "Usage",
        "Write and allocation gates", "Free gates", "Read modes, head 1", "Read modes, head 2",
    ]  # fmt: skip


def test_the_link_follows_the_pointer_a_click_and_the_arrow_keys(page, trace):
    order = first_write_order(trace)
    links = trace.link[0].numpy()[:, :, order][:, :, :, order]

    def shows(step: int) -> None:
        page.wait(f"shown === {step}")
        number, symbols, link = page.shown()
        assert number == step
        assert symbols == [SYMBOLS[name][step] for name in SYMBOLS]
        np.testing.assert_allclose(link, links[step], rtol=0, atol=1 / 510 + 1e-6)

    for step in (3, 1, 5, 0):
        page.point_at(step)
        shows(step)
    page.point_at(2, click=True)
    page.wait("held")
    page.point_at(4)
    shows(2)  # it is held
    page.press("\ue014")  # →
    shows(3)
    page.press("\ue012")  # ←
    shows(2)
    page.point_at(4, click=True)
    page.wait("!held")
    page.point_at(1)
    shows(1)


def test_symbols_are_shown_letter_by_letter_and_errors_marked(page):
    assert page.browser.title == TITLE
    assert page.run("document.querySelector('h1').textContent") == TITLE
    drawn = page.run("[...panels.querySelectorAll('.annotation-text')].map(text => text.textContent)")
    for name in SYMBOLS:
        for symbol in SYMBOLS[name]:
            assert symbol.replace("\n", "") in drawn
    assert page.run("panels.querySelectorAll('.annotation-text b, .annotation-text i').length") == 0
    assert page.drawn("panels", 2, 3)[0].tolist() == [[0, 0, 1, 0, 0, 0]]  # what was not asked for is not wrong
    page.point_at(2)
    page.wait("document.getElementById('output').classList.contains('wrong')")


def test_panels_zoom_as_one_in_time_and_in_slots(page):
    page.run("Plotly.relayout(panels, {'xaxis4.range': [1.5, 4.5], 'yaxis5.range': [4.5, 1.5]})")
    page.wait("panels._fullLayout.xaxis.range[0] === 1.5")
    last = 3 + WRITES + READS + 3 + READS
    for index in range(1, last + 1):
        assert page.run(f"panels._fullLayout['xaxis' + ({index} > 1 ? {index} : '')].range") == [1.5, 4.5]
    for index in range(4, 4 + WRITES + READS + 1):
        assert page.run(f"panels._fullLayout.yaxis{index}.range") == [4.5, 1.5]
    page.run(
        f"Plotly.relayout(panels, {{'xaxis4.range': [-0.5, {STEPS - 0.5}], 'yaxis5.range': [{SLOTS - 0.5}, -0.5]}})"
    )
    page.wait("panels._fullLayout.yaxis4.range[1] === -0.5")


def test_no_error_and_no_network(page):
    """The last test: in all that the others did."""
    assert [entry for entry in page.browser.get_log("browser") if entry["level"] != "DEBUG"] == []
    messages = [json.loads(entry["message"])["message"] for entry in page.browser.get_log("performance")]
    asked = [m["params"]["request"]["url"] for m in messages if m["method"] == "Network.requestWillBeSent"]
    assert any(url.startswith("file:") for url in asked)  # the page itself: requests are seen
    assert [url for url in asked if not url.startswith(("file:", "data:", "blob:"))] == []
