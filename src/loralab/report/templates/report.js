(() => {
  const theme = window.matchMedia("(prefers-color-scheme: dark)");
  const narrow = window.matchMedia("(max-width: 600px)");
  const plots = [...document.querySelectorAll(".plot")];
  const colour = (name) => getComputedStyle(document.documentElement).getPropertyValue(name).trim();

  // "@ink" and its like stand for the theme's colours.
  const read = (plot) => {
    const text = plot.nextElementSibling.textContent;
    return JSON.parse(text.replace(/"@(\w+)"/g, (_, name) => JSON.stringify(colour("--" + name))));
  };

  const draw = (plot) => {
    const figure = read(plot);
    const chosen = plot.dataset.chosen;
    if (chosen) {
      for (const trace of figure.data) {
        if (trace.meta !== chosen) trace.opacity = (trace.opacity ?? 1) * 0.15;
      }
      // Drawn last is drawn on top.
      figure.data.sort((a, b) => (a.meta === chosen) - (b.meta === chosen));
    }
    if (narrow.matches) figure.layout.font.size = 11;
    figure.layout.hoverlabel.bgcolor = colour("--wash");
    Plotly.react(plot, figure.data, figure.layout, { displayModeBar: false });
  };

  for (const chips of document.querySelectorAll(".chips")) {
    const plot = chips.parentElement.querySelector(".plot");
    chips.addEventListener("click", (event) => {
      const button = event.target.closest("button");
      if (!button) return;
      const on = button.getAttribute("aria-pressed") !== "true";
      for (const other of chips.children) other.setAttribute("aria-pressed", String(other === button && on));
      plot.dataset.chosen = on ? button.dataset.label : "";
      draw(plot);
    });
  }
  // A plot follows its own box: a phone that turns, a window that narrows, a panel that opens.
  const boxes = new ResizeObserver((entries) => {
    for (const { target } of entries) if (target.data) Plotly.Plots.resize(target);
  });
  plots.forEach((plot) => boxes.observe(plot));

  const drawAll = () => plots.forEach(draw);
  theme.addEventListener("change", drawAll);
  narrow.addEventListener("change", drawAll);
  drawAll();
})();
