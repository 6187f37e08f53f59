"""Every workflow in ComfyUI's real frontend: loaded, turned into a prompt, run, photographed."""

import pytest

from tests.nodes.server import ROOT, VIDEO_HELPER_SUITE
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
READY = "window.app?.vueAppReady && app.graph && app.extensionManager.workflow.activeWorkflow"
# Returns what the frontend could not make sense of.
LOAD = """async ([workflow, name]) => {
    await app.loadGraphData(workflow, true, true, name)
    const nodes = app.graph.nodes, wrong = []
    for (const node of nodes)
        if (!LiteGraph.registered_node_types[node.type]) wrong.push(`no node ${node.type}`)
    const links = [...app.graph.links.values()]
    for (const link of links) {
        const from = app.graph.getNodeById(link.origin_id)?.outputs[link.origin_slot]
        const to = app.graph.getNodeById(link.target_id)?.inputs[link.target_slot]
        if (!from || !to || !LiteGraph.isValidConnection(from.type, to.type))
            wrong.push(`red link ${link.id}`)
    }
    if (nodes.length != workflow.nodes.length) wrong.push(`${nodes.length} nodes left`)
    if (links.length != workflow.links.length) wrong.push(`${links.length} links left`)
    return wrong
}"""
SETTINGS = {
    "Comfy.TutorialCompleted": True,  # or its dialog covers everything
    "Comfy.Minimap.Visible": False,
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
        if line.type == "error" and not any(name in where for name in MISSING):
            complaints.append(f"{line.text} {where}")

    server.fetch("/settings", SETTINGS)
    page = chromium.new_page(viewport={"width": 1920, "height": 1080})
    page.set_default_timeout(600_000)
    page.goto(server.url, wait_until="commit")
    page.wait_for_function(READY)
    page.wait_for_timeout(1500)
    page.on("pageerror", lambda error: complaints.append(str(error)))
    page.on("console", listen)
    yield page
    page.close()


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.stem)
def test_a_workflow_loads_and_runs_in_the_frontend(page, server, complaints, path):
    """Its screenshot stays in out/. One that names files to download is loaded, but not run."""
    workflow = read(path)
    of_the_suite = [n["id"] for n in nodes_of(workflow) if n["type"].startswith("VHS_")]
    if of_the_suite and not (server.base / "custom_nodes" / VIDEO_HELPER_SUITE).exists():
        pytest.skip(f"needs {VIDEO_HELPER_SUITE} in COMFYUI_DIR/custom_nodes")
    assert page.evaluate(LOAD, [workflow, path.stem]) == []
    prompt = page.evaluate("app.graphToPrompt().then(derived => derived.output)")
    expected = api_prompt(workflow, KNOWN)
    assert prompt.keys() == expected.keys()
    for node in expected.keys() - set(map(str, of_the_suite)):  # that pack adds inputs of its own
        assert prompt[node]["class_type"] == expected[node]["class_type"]
        assert prompt[node]["inputs"] == expected[node]["inputs"]
    if not needs_download(prompt):
        assert page.evaluate(RUN) is None
        page.wait_for_timeout(1500)  # the previews
    page.evaluate(FIT)
    page.wait_for_timeout(1000)
    (ROOT / "out").mkdir(exist_ok=True)
    page.screenshot(path=ROOT / "out" / f"workflow_{path.stem}.png")
    assert complaints == []
