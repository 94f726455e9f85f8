"use strict";

for (const button of document.querySelectorAll("button.log-scale")) {
  const plots = button.closest("figure").querySelectorAll("svg.plot");
  button.hidden = false;
  button.addEventListener("click", () => {
    const logarithmic = button.getAttribute("aria-pressed") !== "true";
    button.setAttribute("aria-pressed", String(logarithmic));
    plots[0].toggleAttribute("hidden", logarithmic);
    plots[1].toggleAttribute("hidden", !logarithmic);
  });
}

// On paper nothing can be opened.
addEventListener("beforeprint", () => {
  for (const details of document.querySelectorAll("details")) details.open = true;
});
