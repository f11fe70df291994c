"use strict";
(() => {
  const data = JSON.parse(document.getElementById("data").textContent);
  const by = (id) => document.getElementById(id);
  const svg = by("overlay"), board = by("board"), slider = by("step"), picker = by("view");
  const source = by("original").src;
  const now = { method: 0, view: 0, step: 0, patch: null };
  let places = []; // of the view: {patch, x, y, wide, high, row, column, rows, columns}
  let fates = null; // of the state, see read()

  const make = (name, attributes, parent) => {
    const made = document.createElementNS("http://www.w3.org/2000/svg", name);
    for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, value);
    if (parent) parent.appendChild(made);
    return made;
  };
  const method = () => data.methods[now.method];
  const view = () => method().views[now.view];
  const state = () => method().states[now.step];
  const box = (p) => `M${p.x} ${p.y}h${p.wide}v${p.high}h${-p.wide}z`;

  // Steps of the golden angle around the wheel: neighbouring numbers are far apart.
  const colour = (slot) => `hsl(${((slot * 0.381966) % 1) * 360} 90% ${[45, 60][slot % 2]}%)`;

  // What each patch is at the moment: size of its group, number of its group, and where it was dropped.
  const read = () => {
    const { owner } = state(), sizes = new Map();
    for (const slot of owner) if (slot >= 0) sizes.set(slot, (sizes.get(slot) || 0) + 1);
    const merged = [...sizes.keys()].filter((slot) => sizes.get(slot) > 1).sort((a, b) => a - b);
    const gone = owner.map((slot, patch) =>
      slot >= 0 ? -1 : method().states.findIndex((one) => one.owner[patch] < 0));
    return { owner, sizes, gone, number: new Map(merged.map((slot, i) => [slot, i + 1])), groups: merged.length };
  };

  // Of caches, in which share of the layers a patch is held; else null.
  const share = (patch) => (state().held ? state().held[patch] / state().layers : null);
  const lost = (patch) => (state().held ? !state().held[patch] : fates.owner[patch] < 0);
  const size = (patch) => (fates.owner[patch] < 0 ? 0 : fates.sizes.get(fates.owner[patch]));
  const late = (patch) => fates.gone[patch] >= 0 && method().states[fates.gone[patch]].stage === "decoder";
  const parted = (one, other) => {
    if (fates.owner[one] !== fates.owner[other] && Math.max(size(one), size(other)) > 1) return true;
    return lost(one) !== lost(other);
  };

  const by_method = (one) => (one.method ? ` by ${one.method}` : "");
  const told = (place) => {
    const { patch } = place, where = `Row ${place.row + 1} of ${place.rows}, column ${place.column + 1} of ${place.columns}: `;
    const one = state();
    if (one.held) return `${where}held in ${Number(one.held[patch].toFixed(1))} of ${one.layers} layers${by_method(one)}.`;
    if (fates.gone[patch] >= 0) {
      const at = fates.gone[patch], one = method().states[at];
      const before = at > 0 ? method().states[at - 1].owner : fates.owner;
      const group = before.filter((slot) => slot >= 0 && slot === before[patch]).length;
      const was = group > 1 ? `, with its group of ${group} patches` : "";
      return `${where}dropped ${one.where}${by_method(one)}${was}.`;
    }
    const many = size(patch);
    const is = many > 1 ? `merged into group ${fates.number.get(fates.owner[patch])} of ${many} patches` : "kept, alone";
    const after = method().states.findIndex((one) => one.owner[patch] < 0);
    const later = after > now.step ? `; dropped later, ${method().states[after].where}${by_method(method().states[after])}` : "";
    return `${where}${is}${later}.`;
  };

  // ------------------------------------------------------------------ drawing
  const lay = () => {
    places = [];
    for (const piece of view().pieces) {
      const [left, top, right, bottom] = piece.box, [rows, columns] = piece.grid;
      const wide = (right - left) / columns, high = (bottom - top) / rows;
      piece.patches.forEach((patch, i) => {
        const row = Math.floor(i / columns), column = i % columns;
        places.push({ patch, x: left + column * wide, y: top + row * high, wide, high, row, column, rows, columns,
          right: column + 1 < columns ? piece.patches[i + 1] : null,
          below: row + 1 < rows ? piece.patches[i + columns] : null });
      });
    }
    const [left, top, right, bottom] = view().part;
    svg.setAttribute("viewBox", `${left} ${top} ${right - left} ${bottom - top}`);
    const [wide, high] = view().shown;
    board.style.aspectRatio = `${wide} / ${high}`;
    board.style.width = `min(100%, ${(80 * wide) / high}vh)`;
  };

  const paint = () => {
    fates = read();
    svg.replaceChildren();
    const defs = make("defs", {}, svg);
    const layer = (name, path, whole, shaded) => {
      if (!path && !whole) return;
      const clip = `clip-${shaded ? shaded.name : name}`;
      if (!whole) make("path", { d: path, "clip-rule": "evenodd" }, make("clipPath", { id: clip }, defs));
      make("image", { href: source, x: 0, y: 0, width: data.width, height: data.height, preserveAspectRatio: "none",
        class: name + (view().pixels ? " pixels" : ""), ...(whole ? {} : { "clip-path": `url(#${clip})` }), ...(shaded ? { opacity: shaded.opacity } : {}) }, svg);
    };
    const inside = view().pieces.map(({ box: [l, t, r, b] }) => `M${l} ${t}H${r}V${b}H${l}z`).join("");
    layer("clear", "", true);
    layer("unseen", `M0 0H${data.width}V${data.height}H0z${inside}`);
    const paths = { early: "", late: "" }, groups = new Map(), dimmer = new Map();
    let border = "";
    for (const place of places) {
      const { patch, x, y, wide, high } = place;
      if (share(patch) !== null) dimmer.set(share(patch), (dimmer.get(share(patch)) || "") + box(place));
      else if (fates.owner[patch] < 0) paths[late(patch) ? "late" : "early"] += box(place);
      if (size(patch) > 1) groups.set(fates.owner[patch], (groups.get(fates.owner[patch]) || "") + box(place));
      if (place.right !== null && parted(patch, place.right)) border += `M${x + wide} ${y}v${high}`;
      if (place.below !== null && parted(patch, place.below)) border += `M${x} ${y + high}h${wide}`;
    }
    layer("early", paths.early);
    layer("late", paths.late);
    let shade = 0;
    for (const [held, d] of dimmer) if (held < 1) layer("early", d, false, { name: `held-${shade++}`, opacity: 1 - held });
    for (const [slot, d] of groups) make("path", { d, class: "group", fill: colour(slot) }, svg);
    make("path", { d: border, class: "border under" }, svg);
    make("path", { d: border, class: "border over" }, svg);
    make("path", { id: "chosen", d: "" }, svg);
    by("caches").hidden = !method().states.some((one) => one.held);
    by("moment").textContent = state().title;
    slider.setAttribute("aria-valuetext", state().title);
    point(now.patch);
  };

  const point = (patch) => {
    const place = patch === null ? null : places.find((one) => one.patch === patch);
    now.patch = place ? patch : null;
    const slot = place ? fates.owner[patch] : -1;
    const same = !place ? [] : slot < 0 ? [place] : places.filter((one) => fates.owner[one.patch] === slot);
    by("chosen").setAttribute("d", same.map(box).join(""));
    by("fate").textContent = place ? told(place) : "Point at a patch, or focus the picture and press an arrow key.";
  };

  const at = (x, y) => places.find((p) => x >= p.x && x < p.x + p.wide && y >= p.y && y < p.y + p.high);

  // ------------------------------------------------------------------ choosing
  const show = () => {
    const { states, views, problem } = method(), there = states.length > 0;
    for (const id of ["board", "moment", "fate"]) by(id).hidden = !there;
    by("missing").hidden = there;
    by("missing").textContent = there ? "" : `No picture of the patches: ${problem}`;
    slider.disabled = states.length < 2;
    document.querySelectorAll("section.method").forEach((one, i) => { one.hidden = i !== now.method; });
    document.querySelectorAll("[data-method]").forEach((one) => {
      const on = Number(one.dataset.method) === now.method;
      one.classList.toggle("now", on);
      one.setAttribute("aria-pressed", on);
    });
    document.querySelectorAll("input[name=method]").forEach((one, i) => { one.checked = i === now.method; });
    if (!there) return;
    slider.max = states.length - 1;
    slider.value = now.step;
    by("stops").replaceChildren(...states.map((one, i) => new Option(one.label, i)));
    now.view = Math.min(now.view, views.length - 1);
    picker.replaceChildren(...views.map((one, i) => new Option(one.name, i, i === now.view, i === now.view)));
    by("viewing").hidden = views.length < 2;
    lay();
    paint();
  };

  const choose = (number) => {
    Object.assign(now, { method: number, step: Math.max(0, data.methods[number].states.length - 1) });
    show();
  };

  slider.addEventListener("input", () => { now.step = Number(slider.value); paint(); });
  picker.addEventListener("change", () => { Object.assign(now, { view: Number(picker.value), patch: null }); lay(); paint(); });
  board.addEventListener("pointermove", (event) => {
    const spot = new DOMPoint(event.clientX, event.clientY).matrixTransform(svg.getScreenCTM().inverse());
    const place = at(spot.x, spot.y);
    point(place ? place.patch : null);
  });
  board.addEventListener("pointerleave", () => { if (document.activeElement !== board) point(null); });
  board.addEventListener("keydown", (event) => {
    const step = { ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, -1], ArrowDown: [0, 1] }[event.key];
    if (event.key === "Escape") return point(null);
    if (!step && event.key !== "Home") return;
    event.preventDefault();
    const from = places.find((one) => one.patch === now.patch);
    if (!from || !step) return point(places[0].patch);
    const to = at(from.x + from.wide * (0.5 + step[0]), from.y + from.high * (0.5 + step[1]));
    if (to) point(to.patch);
  });
  document.querySelectorAll("input[name=method]").forEach((one, i) => one.addEventListener("change", () => choose(i)));
  document.querySelectorAll(".plot [data-method]").forEach((one) => {
    one.addEventListener("click", () => choose(Number(one.dataset.method)));
    one.addEventListener("keydown", (event) => {
      if (event.key !== "Enter" && event.key !== " ") return;
      event.preventDefault();
      choose(Number(one.dataset.method));
    });
  });
  choose(0);
})();
