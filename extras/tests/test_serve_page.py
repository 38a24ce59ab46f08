"""extras/serve.html in a headless Chromium: Figure 1, driven as a person would.

FLORA_SERVE_PNG=figures/serve.png keeps a screenshot of the batch at work.
"""
import os
import shutil
import time

import pytest

from extras.demo import ROWS, load, make_tasks, problem_of, write_programs
from extras.tests.test_serve import Client, lacks, serving
from generate import Engine
from plumbing.flags import EMBEDDED
from plumbing.prompts import cut_at_stop

BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
missing = lacks("starlette", "uvicorn", "selenium") or (None if BROWSER else "chromium") or (
    None if shutil.which("chromedriver") else "chromedriver (Debian: chromium-driver)")
pytestmark = pytest.mark.skipif(missing is not None, reason=f"needs {missing}")
NAMES = {"base": "py", "perl": "pl", "javascript": "js", "bash": "sh"}   # columns of the demo's languages


@pytest.fixture(scope="module")
def server():
    adapters = [flag for name in list(NAMES)[1:]
                for flag in ("--adapter", f"{name}={EMBEDDED}/adapters/{name}.safetensors")]
    with serving(*adapters) as server:
        yield server


@pytest.fixture
def browser(server, tmp_path):
    from selenium import webdriver
    options = webdriver.ChromeOptions()
    options.binary_location = BROWSER
    for flag in ("headless", "no-sandbox", "disable-gpu", "disable-quic", "no-first-run", "disable-sync",
                 "disable-background-networking", "disable-component-update", "window-size=1280,1120",
                 f"user-data-dir={tmp_path}/profile"):
        options.add_argument(f"--{flag}")
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    driver = webdriver.Chrome(options, webdriver.ChromeService(shutil.which("chromedriver")))
    try:
        driver.get(f"http://127.0.0.1:{server.port}/")
        until(lambda: driver.execute_script("return columns.size") == len(NAMES))
        yield driver
    finally:
        driver.quit()


def until(condition, seconds=120):
    for _ in range(20 * seconds):
        if value := condition():
            return value
        time.sleep(0.05)
    raise AssertionError("it did not come about")


def column(browser, name, part):
    """A property of a column: what stands in the page."""
    return browser.execute_script("const c = columns.get(arguments[0]); return " + part, name)


def told(browser):
    """What the page tells of each shown column."""
    return {name: column(browser, name, "c.told.textContent") for name in browser.execute_script(
        "return [...columns.keys()].filter(n => columns.get(n).box.checked)")}


def all_done(browser):
    return "done" in browser.find_element("id", "told").text and all(
        text.endswith("done") for text in told(browser).values())


def press(browser, *keys):
    from selenium.webdriver.common.action_chains import ActionChains
    actions = ActionChains(browser)
    for key in keys:
        actions.send_keys(key)
    actions.perform()


def test_four_columns_write_the_four_programs_of_the_demo_in_one_batch(browser, server):
    tasks = make_tasks()[0]
    problems = {language: problem_of(language, *tasks[17]) for language in ROWS}
    model, tokenizer, ids = load()
    wanted, _ = write_programs(Engine(model, slots=4), tokenizer, problems, ids)

    browser.find_element("id", "example").click()
    browser.find_element("id", "run").click()
    seen = set()   # adapters that the page's table had in the batch at once
    def batch():
        found = frozenset(browser.execute_script(
            "return [...document.querySelectorAll('#batch td:nth-child(2)')].map(e => e.textContent)")) - {"–"}
        if len(found) == 4 and found not in seen and "FLORA_SERVE_PNG" in os.environ:
            browser.save_screenshot(os.environ["FLORA_SERVE_PNG"])
        seen.add(found)
        return all_done(browser)
    until(batch)
    for name, language in NAMES.items():
        text = column(browser, name, "c.text.textContent")
        problem = problems[language]
        assert text == problem.prompt.rstrip() + cut_at_stop(wanted[language], problem.stops), name
        assert column(browser, name, "!c.section.hidden")
    assert max(map(len, seen)) >= 2, seen
    outside = browser.execute_script(
        "return performance.getEntriesByType('resource').map(e => e.name).filter(n => !n.startsWith(location.origin))")
    assert outside == []
    assert [line for line in browser.get_log("browser") if line["level"] == "SEVERE"] == []


def test_the_page_works_by_keyboard_and_at_a_phones_width_and_shows_errors(browser, server):
    from selenium.webdriver.common.keys import Keys
    for width in (390, 1280):
        browser.set_window_size(width, 900)
        assert browser.execute_script("return document.documentElement.scrollWidth <= innerWidth")
    # from the prompt by Tab to the choices, past them to the blend; Enter adds it, Ctrl+Enter runs
    prompt = browser.find_element("id", "prompt")
    prompt.clear()
    prompt.send_keys("sub f {")
    order = []
    for _ in range(len(NAMES) + 1):
        press(browser, Keys.TAB)
        order.append(browser.execute_script("return document.activeElement.value || document.activeElement.id"))
    assert order == [*NAMES, "blend"]
    press(browser, "perl:0.5+bash:0.5", Keys.ENTER, "nobody:1", Keys.ENTER)
    for box in browser.find_elements("css selector", "#models input"):
        if box.get_attribute("value") in ("perl", "javascript", "bash"):
            box.send_keys(Keys.SPACE)
    tokens = browser.find_element("id", "tokens")
    tokens.clear()
    tokens.send_keys("8")
    tokens.send_keys(Keys.CONTROL, Keys.ENTER)
    until(lambda: "no such model" in told(browser)["nobody:1"])
    until(lambda: [text.endswith("done") for name, text in told(browser).items() if name != "nobody:1"] == [True, True])
    client = Client(server)
    for name in ("base", "perl:0.5+bash:0.5"):
        want = client.complete(model=name, prompt="sub f {", max_tokens=8, temperature=0)["choices"][0]["text"]
        assert column(browser, name, "c.text.textContent") == "sub f {" + want
    assert told(browser)["base"].startswith("8 tokens, ")
    # Esc stops: the slots are free again
    until(lambda: browser.execute_script("return running === null"))
    tokens.clear()
    tokens.send_keys("400")
    tokens.send_keys(Keys.CONTROL, Keys.ENTER)
    until(lambda: " tokens/s" in told(browser)["base"])
    press(browser, Keys.ESCAPE)
    until(lambda: "stopped" in told(browser)["base"])
    client.idle()
