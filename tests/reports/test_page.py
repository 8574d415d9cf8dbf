"""The page as a browser has it: a real Chromium, headless."""

import math
import shutil

import pytest

from fewbits.reports.page import page as render

playwright = pytest.importorskip("playwright.sync_api", reason="the package playwright drives the browser")
CHROMIUM = shutil.which("chromium")
if CHROMIUM is None:
    pytest.skip("no chromium is installed: apt-get install chromium", allow_module_level=True)
OPTIONS = ["--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking"]
OPTIONS += ["--disable-component-update", "--disable-sync"]


@pytest.fixture(scope="module")
def browser():
    with playwright.sync_playwright() as started:
        opened = started.chromium.launch(executable_path=CHROMIUM, args=OPTIONS)
        yield opened
        opened.close()


@pytest.fixture(scope="module")
def file(record, tmp_path_factory):
    path = tmp_path_factory.mktemp("page") / "report.html"
    path.write_text(render(record), encoding="utf-8")
    return path


@pytest.fixture
def visit(browser, file):
    """Opens the page at some size; whatever is asked of the network and whatever goes wrong is kept in `seen`."""
    opened = []

    def visit(width=1280, height=900, scheme="light"):
        page = browser.new_page(viewport={"width": width, "height": height}, color_scheme=scheme)
        page.seen = []
        page.on("request", lambda request: page.seen.append(request.url))
        page.on("pageerror", lambda error: page.seen.append(str(error)))
        page.on("console", lambda message: page.seen.append(message.text))
        page.goto(file.as_uri())
        page.wait_for_selector(".point")
        opened.append(page)
        return page

    yield visit
    for page in opened:
        page.close()


def names(page, selector):
    return page.eval_on_selector_all(selector, "all => all.map((one) => one.textContent.trim())")


def test_one_small_file_that_asks_nobody(visit, file, record):
    page = visit()
    page.click(".point[data-name='gptq:bits=3']")
    page.click("#theme")
    for metric in ("Perplexity", "Loss difference"):
        page.get_by_role("radio", name=metric).click()
    page.wait_for_timeout(100)
    local = [url for url in page.seen if url != "data:,"]  # the empty icon is in the page itself
    assert local == [file.as_uri()] and file.stat().st_size < 200_000
    assert page.locator(".point").count() == len(record["results"]["configurations"])


def test_what_a_model_writes_is_text_and_no_markup(visit):
    page = visit()
    page.get_by_role("radio", name="prompt 2").click()
    assert page.title() == "builtin:tiny-lm: fewbits compare" and page.locator("img").count() == 0
    evil = page.locator(".sample").filter(has_text="onerror")
    assert evil.count() == 1 and "</script>" in evil.inner_text()
    assert "as the dense model" in names(page, ".sample h3 span") and len(page.seen) <= 2


def test_a_click_on_a_point_filters_everything_else(visit):
    page = visit()
    assert page.locator(".bar").count() == 5 and page.locator("#heat tbody tr").count() == 5 and page.locator(".sample").count() == 6
    page.click(".point[data-name='gptq:bits=4']")
    assert names(page, ".bar .name") == ["gptq:bits=4"] and names(page, ".sample h3")[1].startswith("gptq:bits=4")
    assert names(page, "#heat tbody th") == ["self_attn.q_proj", "self_attn.o_proj", "mlp.down_proj"]
    assert page.locator("tr.on").count() == 1 and page.locator(".point.dim").count() == 4
    assert page.locator("details[open]").count() == 1 and "gptq" in page.locator("#selection").inner_text()
    page.click("#rows tr[data-name='rtn:bits=3'] .pick")  # the table chooses as well
    assert names(page, ".bar .name") == ["rtn:bits=3", "gptq:bits=4"] and page.locator("#heat tbody tr").count() == 2
    page.keyboard.press("Escape")
    assert page.locator(".bar").count() == 5 and page.locator(".point.dim").count() == 0
    page.get_by_role("button", name="gptq", exact=True).click()
    assert names(page, ".bar .name") == ["gptq:bits=3", "gptq:bits=4"]


def test_the_keyboard_is_enough(visit):
    page = visit()
    for _ in range(40):
        page.keyboard.press("Tab")
        if page.evaluate("document.activeElement.classList.contains('point')"):
            break
    focused = "document.activeElement.dataset.name"
    assert page.evaluate(focused) == "rtn:bits=3" and page.locator("#tip").is_visible()  # the first by bits
    assert "9.20 \u2013 11.20" in page.locator("#tip").inner_text() and "scales" in page.locator("#tip").inner_text()
    page.keyboard.press("ArrowRight")
    assert page.evaluate(focused) == "gptq:bits=3"
    page.keyboard.press("Enter")
    assert page.evaluate(focused) == "gptq:bits=3" and names(page, ".bar .name") == ["gptq:bits=3"]  # drawn anew, and still there
    assert page.get_attribute(".point[data-name='gptq:bits=3']", "aria-pressed") == "true"
    page.keyboard.press("Escape")
    page.get_by_role("radio", name="KL divergence").focus()
    page.keyboard.press("ArrowRight")
    assert page.get_by_role("radio", name="Perplexity").get_attribute("aria-checked") == "true"
    page.get_by_role("button", name="KL", exact=True).focus()
    page.keyboard.press("Enter")
    assert names(page, "#rows tbody .pick")[0] == "gptq:bits=4"  # the smallest divergence


def places(page):
    found = "all => all.map((one) => [one.dataset.name, ...one.getAttribute('transform').match(/-?[\\d.]+/g).map(Number)])"
    return {name: (x, y) for name, x, y in page.eval_on_selector_all(".point", found)}


def test_points_are_where_their_numbers_say(visit, record):
    page, rows = visit(), {row["name"]: row for row in record["results"]["configurations"]}
    at = places(page)
    step = (at["rtn:bits=4"][0] - at["rtn:bits=3"][0]) / 1.0  # pixels a bit
    assert at["evil"][0] == pytest.approx(at["rtn:bits=3"][0] + 0.5 * step, abs=0.1) and step > 0
    tenfold = (at["gptq:bits=4"][1] - at["rtn:bits=3"][1]) / math.log10(0.2 / 0.02)  # pixels downwards for a tenth of the divergence
    for name, (_, y) in at.items():
        assert y == pytest.approx(at["rtn:bits=3"][1] + tenfold * math.log10(0.2 / rows[name]["kl_mean"]), abs=0.1)
    corners = page.get_attribute(".frontier", "points").split()
    assert [float(corner.split(",")[0]) for corner in corners] == pytest.approx(
        [at[name][0] for name in ("gptq:bits=3", "evil", "gptq:bits=4")], abs=0.1
    )
    page.get_by_role("radio", name="Perplexity").click()
    at = places(page)
    assert (at["rtn:bits=3"][1] - at["gptq:bits=3"][1]) / (at["gptq:bits=3"][1] - at["gptq:bits=4"][1]) == pytest.approx(
        0.1 / 0.08, abs=0.01
    )


def test_verdicts_follow_the_baseline(visit):
    page = visit()
    said = {name: page.locator(f"tr[data-name='{name}'] .pill").inner_text() for name in ("rtn:bits=3", "gptq:bits=3", "rtn:bits=4")}
    assert said == {"rtn:bits=3": "baseline", "gptq:bits=3": "better", "rtn:bits=4": "better"}
    page.select_option("#baseline", "evil")
    said = {
        name: page.locator(f"tr[data-name='{name}'] .pill").inner_text() for name in ("rtn:bits=3", "evil", "rtn:bits=4", "gptq:bits=4")
    }
    assert said == {"rtn:bits=3": "worse", "evil": "baseline", "rtn:bits=4": "not distinguishable", "gptq:bits=4": "better"}


def test_bars_have_the_lengths_of_their_bits(visit):
    page = visit()
    widths = page.eval_on_selector_all(
        ".bar .track", "all => all.map((one) => [...one.children].map((part) => part.getBoundingClientRect().width))"
    )
    assert widths[0][0] / widths[1][0] == pytest.approx(3.0 / 4.0, abs=0.02) and widths[0][1] == pytest.approx(widths[0][2], abs=1)


@pytest.mark.parametrize("width", [320, 375, 768])
def test_no_page_is_wider_than_its_screen(visit, width):
    page = visit(width, 800)
    page.click(".point[data-name='evil']")
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    assert all(
        box <= width + 0.5 for box in page.eval_on_selector_all(".card", "all => all.map((one) => one.getBoundingClientRect().right)")
    )
    names_shown = page.eval_on_selector_all(
        ".plot .name", "all => all.map((one) => one.getBoundingClientRect()).map((box) => [box.left, box.right])"
    )
    assert all(left >= 0 and right <= width for left, right in names_shown)


@pytest.mark.parametrize(("scheme", "width"), [("light", 1280), ("dark", 1280), ("light", 375), ("dark", 375)])
def test_axe_finds_no_serious_violation(visit, scheme, width):
    axe = pytest.importorskip("axe_playwright_python.sync_playwright", reason="the package axe-playwright-python brings axe-core")
    page = visit(width, 800, scheme)
    for state in ("all", "chosen"):
        if state == "chosen":
            page.click(".point[data-name='gptq:bits=4']")
        found = axe.Axe().run(page).response
        assert len(found["passes"]) > 20  # it did look
        bad = [(one["id"], one["nodes"][0]["html"]) for one in found["violations"] if one["impact"] in ("serious", "critical")]
        assert bad == []


def test_colours_follow_the_system_and_the_button(visit):
    page = visit(scheme="dark")
    ground = "getComputedStyle(document.body).backgroundColor"
    dark = page.evaluate(ground)
    page.click("#theme")
    light = page.evaluate(ground)
    assert dark == "rgb(17, 19, 22)" and light == "rgb(247, 246, 242)" and page.locator("#theme").inner_text() == "Light"
    page.click("#theme")
    assert page.evaluate(ground) == dark
