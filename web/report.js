import { app } from "../../scripts/app.js";

// A STAR node with an output called `report` shows it in a widget of that name. The widget's value
// is saved with the workflow, so it survives a reload, but is not part of the prompt: a node whose
// inputs did not change is not run again.
const NAME = "report";

function reports({ nodeData }) {
  return nodeData?.name.startsWith("STAR_") && nodeData.output_name.includes(NAME);
}

function show(node, output) {
  const report = output?.text?.[0];
  const widget = node.widgets?.find(({ name }) => name === NAME);
  if (!widget || report === undefined || report === widget.value) return;
  // The frontend saves a workflow for the next reload only after these events.
  app.canvas.emitBeforeChange();
  widget.value = report;
  app.canvas.emitAfterChange();
}

app.registerExtension({
  name: "STAR.Report",
  nodeCreated(node) {
    if (!reports(node.constructor)) return;
    const { widget } = app.widgets.STRING(node, NAME, ["STRING", { multiline: true }], app);
    widget.options.serialize = false;
    widget.options.read_only = true;
    widget.options.getMinHeight = () => 160;
    widget.element.readOnly = true;
    widget.element.style.fontFamily = "monospace"; // reports hold tables
    const [width, height] = node.computeSize();
    node.setSize([Math.max(width, 400), height]);
    const { onExecuted } = node;
    node.onExecuted = function (output) {
      onExecuted?.apply(this, arguments);
      show(this, output);
    };
  },
  // For results that arrived while another workflow was open.
  onNodeOutputsUpdated(outputs) {
    for (const node of app.graph.nodes)
      if (reports(node.constructor)) show(node, outputs[node.id]);
  },
});
