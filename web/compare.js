import { app } from "../../scripts/app.js";
import { api } from "../../scripts/api.js";

// STAR Compare shows the frontend's slider in Nodes 2.0, the only nodes that support one.
// Otherwise the frontend shows the node's picture, half before and half after.
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
      // Newer frontends set both from the output themselves.
      slider.value = { beforeImages: urls(output.a_images), afterImages: urls(output.b_images) };
      slider.callback?.(slider.value);
    };
  },
});
