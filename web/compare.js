import { app } from "../../scripts/app.js";
import { api } from "../../scripts/api.js";

// STAR Compare shows the frontend's slider where nodes are drawn that can hold one (Nodes 2.0).
// Elsewhere the frontend shows the picture of the node by itself, half before and half after.
app.registerExtension({
  name: "STAR.Compare",
  nodeCreated(node) {
    if (node.comfyClass !== "STAR_Compare") return;
    if (!LiteGraph.vueNodesMode || !app.widgets.IMAGECOMPARE) return;
    const slider = node.addWidget("imagecompare", "slider", ["", ""], () => {}, { serialize: false });
    slider.serialize = false;
    node.hideOutputImages = true;
    const [width, height] = node.size;
    node.setSize([Math.max(width, 400), Math.max(height, 400)]);
    const { onExecuted } = node;
    node.onExecuted = function (output) {
      onExecuted?.apply(this, arguments);
      const urls = (images) =>
        images.map((image) => api.apiURL(`/view?${new URLSearchParams(image)}${app.getRandParam()}`));
      // Newer frontends take both from the output by themselves.
      slider.value = { beforeImages: urls(output.a_images), afterImages: urls(output.b_images) };
      slider.callback?.(slider.value);
    };
  },
});
