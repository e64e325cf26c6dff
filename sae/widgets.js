// What `sae.widgets.Dial` shows: a row for each feature (on or off, slider, strength), the prompt, both answers.
// Text enters the page by textContent alone. One request is under way at a time; what changed meanwhile is asked after it.

function element(tag, text = "", attributes = {}) {
  const made = document.createElement(tag);
  made.textContent = text;
  for (const [name, value] of Object.entries(attributes)) made.setAttribute(name, value);
  return made;
}

function render({ model, el }) {
  let waiting = 0; // the number of the request under way
  let again = false;

  const rows = model.get("features").map(({ feature, label, top }) => {
    const name = label ? `${feature} (${label})` : `${feature}`;
    const on = element("input", "", { type: "checkbox", "aria-label": `${name} on` });
    const slider = element("input", "", { type: "range", min: 0, max: top, step: 0.01, "aria-label": name });
    const told = element("output");
    const tell = () => {
      told.textContent = on.checked ? `${Number(slider.value).toFixed(2)}x` : "off";
    };
    slider.addEventListener("input", () => {
      on.checked = true;
      tell();
    });
    slider.addEventListener("change", ask);
    on.addEventListener("change", () => {
      tell();
      ask();
    });
    const place = (strength) => {
      on.checked = strength !== null;
      slider.value = strength ?? slider.value;
      tell();
    };
    const row = element("label", "", { class: "dial" });
    row.append(on, element("span", name), slider, told);
    return { feature, on, slider, place, row };
  });

  const prompt = element("input", "", { type: "text", "aria-label": "prompt" });
  const button = element("button", "Ask", { type: "submit" });
  const form = element("form");
  form.append(prompt, button);
  form.addEventListener("submit", (event) => {
    event.preventDefault();
    ask();
  });

  const plain = element("div", "", { class: "text" });
  const steered = element("div", "", { class: "text" });
  const error = element("div", "", { role: "alert" });
  const pair = element("div", "", { class: "pair" });
  for (const [name, text] of [["plain", plain], ["steered", steered]]) {
    const side = element("div");
    side.append(element("b", name), text);
    pair.append(side);
  }

  function ask() {
    if (waiting) {
      again = true;
      return;
    }
    again = false;
    waiting = model.get("request").n + 1;
    const turned = rows.map(({ feature, on, slider }) => [feature, on.checked ? Number(slider.value) : null]);
    model.set("request", { n: waiting, prompt: prompt.value, strengths: Object.fromEntries(turned) });
    model.save_changes();
    button.textContent = "…";
  }

  function place() {
    const request = model.get("request");
    prompt.value = request.prompt;
    for (const { feature, place } of rows) place(request.strengths[feature]);
  }

  function show() {
    const answer = model.get("answer");
    plain.textContent = answer.plain;
    error.textContent = answer.error;
    steered.replaceChildren(
      ...answer.steered.map(([text, ground, title]) => {
        const piece = element("span", text);
        if (ground) {
          piece.style.backgroundColor = ground;
          piece.title = title;
        }
        return piece;
      }),
    );
    if (!answer.done || answer.n < waiting) return;
    waiting = 0;
    button.textContent = "Ask";
    if (again) ask();
  }

  el.classList.add("goldengate-dial");
  el.append(...rows.map(({ row }) => row), form, error, pair);
  model.on("change:request", place);
  model.on("change:answer", show);
  place();
  show();
  return () => {
    model.off("change:request", place);
    model.off("change:answer", show);
  };
}

export default { render };
