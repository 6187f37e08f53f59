"""Every workflow in ComfyUI's real frontend: loaded, turned into a prompt, run, photographed."""

import pytest

from tests.nodes.server import ROOT, VIDEO_HELPER_SUITE
from tests.nodes.test_server import node
from tests.nodes.workflow import (
    WORKFLOWS,
    api_prompt,
    definitions,
    needs_download,
    nodes_of,
    read,
)

pytestmark = pytest.mark.browser

KNOWN = definitions()
# What the frontend asks for at every start, and a fresh server answers with 404.
MISSING = ("/user.css", "/favicon.ico", "/userdata?dir=", "/userdata/")
# The server lets no page load anything from elsewhere, such as the sizes of missing models.
NOT_OURS = ("Content Security Policy", '"content-length" header not found')
READY = "window.app?.vueAppReady && app.graph && app.extensionManager.workflow.activeWorkflow"
# Returns what the frontend could not make sense of.
LOAD = """async ([workflow, name]) => {
    await app.loadGraphData(workflow, true, true, name)
    const wrong = [], drawn = [workflow, ...workflow.definitions?.subgraphs ?? []]
    for (const [place, graph] of [app.graph, ...app.graph.subgraphs.values()].entries()) {
        const nodes = graph.nodes, links = [...graph.links.values()]
        for (const node of nodes)
            if (!LiteGraph.registered_node_types[node.type]) wrong.push(`no node ${node.type}`)
        for (const link of links) {
            const from = link.origin_id == -10 ? graph.inputs[link.origin_slot]
                : graph.getNodeById(link.origin_id)?.outputs[link.origin_slot]
            const to = link.target_id == -20 ? graph.outputs[link.target_slot]
                : graph.getNodeById(link.target_id)?.inputs[link.target_slot]
            if (!from || !to || !LiteGraph.isValidConnection(from.type, to.type))
                wrong.push(`red link ${link.id}`)
        }
        if (nodes.length != drawn[place].nodes.length) wrong.push(`${nodes.length} nodes left`)
        if (links.length != drawn[place].links.length) wrong.push(`${links.length} links left`)
    }
    return wrong
}"""
NODES_2 = "Comfy.VueNodes.Enabled"
# Where people cannot choose it, it is a draft for the frontend's developers.
OFFERS_NODES_2 = f"app.ui.settings.settingsLookup['{NODES_2}']?.type == 'boolean'"
SET_NODES_2 = f"on => app.extensionManager.setting.set('{NODES_2}', on)"
OFFERS_APPS = "app.extensionManager.command.commands.some(({id}) => id == 'Comfy.ToggleLinear')"
IS_APP = "app.extensionManager.workflow.activeWorkflow.initialMode == 'app'"
LEAVE_APP = "app.extensionManager.command.execute('Comfy.ToggleLinear')"
# Nodes that come closer than 40 pixels, as they are drawn: a title is then under another node.
CROWDED = """() => {
    const boxes = app.graph.nodes.map(node => {
        const element = document.querySelector(`[data-node-id="${node.id}"]`)
        if (!element) {
            const [x, y, width, height] = node.getBounding()
            return [node.title, x, y, x + width, y + height]
        }
        const {left, top, right, bottom} = element.getBoundingClientRect()
        return [node.title, ...[left, top, right, bottom].map(v => v / app.canvas.ds.scale)]
    })
    const crowded = []
    for (const [i, [one, left, top, right, bottom]] of boxes.entries())
        for (const [other, ...b] of boxes.slice(i + 1))
            if (Math.max(b[0] - right, left - b[2], b[1] - bottom, top - b[3]) < 40)
                crowded.push(`${one} and ${other}`)
    return crowded
}"""
SETTINGS = {
    "Comfy.TutorialCompleted": True,  # or its dialog covers everything
    "Comfy.Minimap.Visible": False,
    NODES_2: False,
    "Comfy.Graph.CanvasInfo": False,
    "Comfy.Graph.CanvasMenu": False,
    "LiteGraph.Canvas.LowQualityRenderingZoomThreshold": 0,  # words stay readable from afar
}
# Shows the whole graph beside the frontend's own bars.
FIT = """() => {
    const boxes = app.graph.nodes.map(node => node.getBounding())
    const left = Math.min(...boxes.map(b => b[0])), top = Math.min(...boxes.map(b => b[1]))
    const right = Math.max(...boxes.map(b => b[0] + b[2]))
    const bottom = Math.max(...boxes.map(b => b[1] + b[3]))
    const canvas = app.canvas.canvas.getBoundingClientRect()
    const view = {left: 90 - canvas.left, top: 100 - canvas.top, width: 1800, height: 950}
    const scale = Math.min(view.width / (right - left), view.height / (bottom - top), 1.5)
    app.canvas.ds.scale = scale
    app.canvas.ds.offset[0] = (view.left + view.width / 2) / scale - (left + right) / 2
    app.canvas.ds.offset[1] = (view.top + view.height / 2) / scale - (top + bottom) / 2
    app.canvas.setDirty(true, true)
}"""
# Queues as the button does, and returns the host's account of an error, or null.
RUN = """() => new Promise((resolve, reject) => {
    app.api.addEventListener('execution_success', () => resolve(null))
    app.api.addEventListener('execution_interrupted', () => resolve('interrupted'))
    app.api.addEventListener('execution_error', ({detail}) => resolve(
        [detail.node_type, detail.exception_message, ...detail.traceback].join('\\n')))
    app.queuePrompt(0).then(() => {
        if (app.lastNodeErrors && Object.keys(app.lastNodeErrors).length)
            resolve(JSON.stringify(app.lastNodeErrors))
    }, reject)
})"""


@pytest.fixture
def complaints():
    """What the page reports as errors."""
    return []


@pytest.fixture
def page(chromium, server, complaints):
    """The frontend with an empty graph."""

    def listen(line):
        where = line.location.get("url", "")
        missing = any(name in where for name in MISSING)
        if line.type == "error" and not missing and not any(t in line.text for t in NOT_OURS):
            complaints.append(f"{line.text} {where}")

    server.fetch("/settings", SETTINGS)
    page = chromium.new_page(viewport={"width": 1920, "height": 1080})
    page.set_default_timeout(600_000)
    # A frontend that offers missing model files asks the hub how large they are.
    page.route(lambda url: not url.startswith(server.url), lambda route: route.fulfill(status=204))
    page.goto(server.url, wait_until="commit")
    page.wait_for_function(READY)
    page.wait_for_timeout(1500)
    page.on("pageerror", lambda error: complaints.append(str(error.stack)))
    page.on("console", listen)
    yield page
    page.close()


def photograph(page, name):
    """The whole graph, into out/; which nodes it shows too close together."""
    page.evaluate(FIT)
    page.wait_for_timeout(1500)
    (ROOT / "out").mkdir(exist_ok=True)
    page.screenshot(path=ROOT / "out" / f"{name}.png")
    return page.evaluate(CROWDED)


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.stem)
def test_a_workflow_loads_and_runs_in_the_frontend(page, server, complaints, path):
    """With a screenshot, also in Nodes 2.0. One that fetches files is loaded, but not run."""
    workflow = read(path)
    others = {n["id"] for n in nodes_of(workflow) if not n["type"].startswith("STAR_")}
    of_the_suite = [n for n in workflow["nodes"] if n["type"].startswith("VHS_")]
    if of_the_suite and not (server.base / "custom_nodes" / VIDEO_HELPER_SUITE).exists():
        pytest.skip(f"needs {VIDEO_HELPER_SUITE} in COMFYUI_DIR/custom_nodes")
    assert page.evaluate(LOAD, [workflow, path.stem]) == []
    prompt = page.evaluate("app.graphToPrompt().then(derived => derived.output)")
    expected = api_prompt(workflow, KNOWN)
    assert prompt.keys() == expected.keys()
    for key in expected:
        assert prompt[key]["class_type"] == expected[key]["class_type"]
        given, wanted = prompt[key]["inputs"], expected[key]["inputs"]
        if key in others:  # these have more inputs in newer versions
            given = {name: value for name, value in given.items() if name in wanted}
        assert given == wanted
    as_app = workflow["extra"].get("linearMode", False) and page.evaluate(OFFERS_APPS)
    assert page.evaluate(IS_APP) == as_app
    if not needs_download(prompt):
        assert page.evaluate(RUN) is None
        page.wait_for_timeout(1500)  # the previews
    if as_app:
        page.screenshot(path=ROOT / "out" / f"workflow_{path.stem}_app.png")
        page.evaluate(LEAVE_APP)
        page.wait_for_timeout(1500)
    assert photograph(page, f"workflow_{path.stem}") == []
    if page.evaluate(OFFERS_NODES_2):
        page.evaluate(SET_NODES_2, True)
        page.wait_for_timeout(1500)
        assert photograph(page, f"workflow_{path.stem}_nodes2") == []
    assert complaints == []


# Names of nodes in the order in which the frontend's search lists them, and whether it knows of
# further words to search for.
SEARCH = """words => {
    const pinia = document.querySelector('#vue-app').__vue_app__.config.globalProperties.$pinia
    const store = pinia._s.get('nodeDef')
    return [
        store.nodeSearchService.searchNode(words).map(found => found.name),
        'search_aliases' in store.nodeDefsByName.STAR_Restore,
    ]
}"""


@pytest.mark.parametrize(
    ("words", "first"),
    [
        ("upscale", {"STAR_Restore"}),
        ("super resolution", {"STAR_Restore", "STAR_RestoreVideo"}),
        ("video restore", {"STAR_Restore", "STAR_RestoreVideo"}),
    ],
)
def test_a_search_finds_the_nodes_that_do_everything_first(page, words, first):
    """Of this pack: nodes that are called so come before them."""
    found, has_aliases = page.evaluate(SEARCH, words)
    if not has_aliases:
        pytest.skip("needs a frontend that searches for aliases")
    of_the_pack = [name for name in found if name.startswith("STAR_")]
    assert set(of_the_pack[: len(first)]) == first


REPORTING = {
    "1": node("STAR_LoadModel"),
    "3": node("EmptyImage", width=96, height=64, batch_size=2, color=0x806040),
    "4": node("STAR_AnalyzeDegradation", images=["3", 0], model=["1", 0]),
    "5": node("EmptyHunyuanLatentVideo", width=640, height=384, length=9, batch_size=1),
    "6": node("STAR_Plan", model=["1", 0], vae=["1", 2], latent=["5", 0]),
    "7": node("STAR_Metrics", images=["3", 0], reference=["3", 0], metrics="psnr"),
}
REPORTS = {
    "4": "clean: noise of 0.0 levels",
    "6": "all frames in one window",
    "7": "higher is better",
}
FORGET = """() => {
    for (const node of app.graph.nodes)
        for (const widget of node.widgets ?? []) if (widget.name == 'report') widget.value = ''
}"""
# Keeps the names of the nodes whose results the host had already.
LISTEN = """() => app.api.addEventListener(
    'execution_cached', ({detail}) => window.cached = detail.nodes)"""
# Starts a run and opens another workflow before it begins; returns when it has ended.
RUN_UNSEEN = """async () => {
    const ended = new Promise(resolve => app.api.addEventListener('execution_success', resolve))
    await app.queuePrompt(0)
    await app.extensionManager.command.execute('Comfy.NewBlankWorkflow')
    const unseen = !app.graph.nodes.length && !window.cached
    await ended
    return unseen
}"""
# Whether every one of some words stands in a box of text.
SHOWN = """words => words.every(
    word => [...document.querySelectorAll('textarea')].some(box => box.value.includes(word)))"""
BACK = "app.extensionManager.command.execute('Workspace.PreviousOpenedWorkflow')"


def reload(page, complaints):
    assert complaints == []
    page.reload()
    page.wait_for_function(READY)
    page.wait_for_timeout(1500)
    complaints.clear()  # what a frontend says at its start is its own affair


def reports_on(page):
    """What stands in the text boxes that a person sees but cannot write into."""
    page.wait_for_timeout(1500)
    page.evaluate(FIT)
    page.wait_for_timeout(1000)
    boxes = page.locator("textarea:visible").all()
    return {box.input_value() for box in boxes if not box.is_editable()}


COMPARING = {
    "1": node("EmptyImage", width=64, height=48, batch_size=1, color=0x806040),
    "2": node("EmptyImage", width=128, height=96, batch_size=1, color=0x4080C0),
    "3": node("STAR_Compare", before=["1", 0], after=["2", 0]),
}
# How wide the pictures are that STAR Compare shows.
WIDTHS = """async () => {
    const own = name => app.nodeOutputs['3'][name][0].filename
    const widths = {}
    for (const img of document.querySelectorAll('img')) {
        const name = ['images', 'a_images', 'b_images'].find(n => img.src.includes(own(n)))
        if (name && img.checkVisibility()) widths[name] = img.naturalWidth
    }
    for (const img of app.graph.getNodeById(3).imgs ?? []) widths.canvas = img.naturalWidth
    return widths
}"""


@pytest.mark.parametrize("nodes_2", [False, True], ids=["classic", "nodes2"])
def test_compare_shows_the_slider_or_the_picture(page, complaints, nodes_2, request):
    if nodes_2 and not page.evaluate(OFFERS_NODES_2):
        pytest.skip("needs a frontend that offers Nodes 2.0")
    page.evaluate(SET_NODES_2, nodes_2)
    page.evaluate("prompt => app.loadApiJson(prompt, 'compare')", COMPARING)
    assert page.evaluate(RUN) is None
    page.wait_for_timeout(1500)
    photograph(page, f"compare_{request.node.callspec.id}")
    expected = {"a_images": 128, "b_images": 128} if nodes_2 else {"canvas": 128}
    assert page.evaluate(WIDTHS) == expected
    assert complaints == []


@pytest.mark.parametrize("nodes_2", [False, True], ids=["classic", "nodes2"])
def test_reports_stay_in_their_nodes(page, complaints, nodes_2, request):
    """After the run, after a reload, and when the next run takes them from the host's cache."""
    if nodes_2 and not page.evaluate(OFFERS_NODES_2):
        pytest.skip("needs a frontend that offers Nodes 2.0")
    page.evaluate(SET_NODES_2, nodes_2)
    page.evaluate("prompt => app.loadApiJson(prompt, 'reports')", REPORTING)
    assert page.evaluate(RUN) is None
    shown = reports_on(page)
    assert len(shown) == len(REPORTS)
    assert all(any(words in text for text in shown) for words in REPORTS.values())
    reload(page, complaints)
    assert reports_on(page) == shown
    prompt = page.evaluate("app.graphToPrompt().then(derived => derived.output)")
    assert not any("report" in prompt[key]["inputs"] for key in REPORTS)
    page.evaluate(FORGET)
    assert not reports_on(page) & shown
    page.evaluate(LISTEN)
    assert page.evaluate(RUN) is None
    assert REPORTS.keys() <= set(page.evaluate("window.cached"))
    assert reports_on(page) == shown
    photograph(page, f"reports_{request.node.callspec.id}")
    assert complaints == []


def test_a_report_that_came_while_another_workflow_was_open_is_there_on_return(page, server):
    setter = "!!Object.getOwnPropertyDescriptor(Object.getPrototypeOf(app), 'nodeOutputs')?.set"
    if not page.evaluate(setter):
        pytest.skip("needs a frontend that tells extensions of outputs that it restores")
    page.evaluate("prompt => app.loadApiJson(prompt, 'reports')", REPORTING)
    page.evaluate(LISTEN)
    frames = node("EmptyImage", width=512, height=512, batch_size=120, color=0)
    measured = node("STAR_Metrics", images=["1", 0], reference=["1", 0], metrics="ssim")
    server.fetch("/prompt", {"prompt": {"1": frames, "2": measured}})  # the run has to wait for it
    assert page.evaluate(RUN_UNSEEN)
    page.evaluate(BACK)
    page.wait_for_function(SHOWN, arg=list(REPORTS.values()), timeout=60_000)
