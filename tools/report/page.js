"use strict";
(() => {
  const data = JSON.parse(document.getElementById("data").textContent);
  const $ = (id) => document.getElementById(id);
  const make = (tag, kind, said) => {
    const made = document.createElement(tag);
    if (kind) made.className = kind;
    if (said !== undefined) made.textContent = said;
    return made;
  };
  const count = new Intl.NumberFormat("en-US");
  const plural = (n, noun) => `${count.format(n)} ${noun}${n === 1 ? "" : "s"}`;
  const bytes = (n) => {
    const units = ["B", "KiB", "MiB", "GiB", "TiB", "PiB"];
    let unit = 0;
    while (n >= 999.5 && unit < 5) { n /= 1024; unit += 1; }
    return `${unit && n < 99.95 ? n.toFixed(1) : n.toFixed(0)} ${units[unit]}`;
  };
  const age = (seconds) => {
    if (seconds < 60) return "just now";
    if (seconds < 3600) return `${Math.floor(seconds / 60)} min ago`;
    if (seconds < 172800) return `${Math.floor(seconds / 3600)} h ago`;
    return `${count.format(Math.floor(seconds / 86400))} days ago`;
  };

  // -- colours

  const themes = ["system", "light", "dark"];
  $("theme").addEventListener("click", () => {
    const now = themes[(themes.indexOf(document.documentElement.dataset.theme || "system") + 1) % 3];
    if (now === "system") delete document.documentElement.dataset.theme;
    else document.documentElement.dataset.theme = now;
    $("theme").textContent = `Colours: ${now}`;
    $("theme").setAttribute("aria-label", `Colours: ${now === "system" ? "as the system has them" : now}`);
  });

  // -- the table of sequences

  const sequences = data.sequences.map((s) => ({
    key: s[0], name: s[1], model: data.models[s[2]], fidelity: data.ways[s[3]], tokens: s[4], last: s[5], segments: s[6],
    kv: s[7], own: s[8], used: s[9], hits: s[10], expires: s[11], pinned: s[12], damaged: s[13],
  }));
  const state = (s) => [
    s.damaged ? "damaged" : "", s.pinned ? "pinned" : "",
    s.expires === null ? "" : s.expires <= data.now ? "expired" : `expires in ${Math.ceil((s.expires - data.now) / 3600)} h`,
  ].filter(Boolean).join(", ");
  for (const s of sequences) s.text = `${s.name}\n${s.model}\n${s.fidelity}\n${state(s)}`.toLowerCase();
  const columns = [
    { label: "Name", value: (s) => s.name.toLowerCase(), kind: "word wrap", shown: (s) => s.name || "-", leads: (s) => s.name },
    { label: "Key", value: (s) => s.key, kind: "word key", shown: (s) => s.key.slice(0, 8), leads: () => true },
    { label: "Tokens", value: (s) => s.tokens, shown: (s) => count.format(s.tokens) },
    { label: "KV", value: (s) => (s.kv === null ? -1 : s.kv), shown: (s) => (s.kv === null ? "unknown" : bytes(s.kv)) },
    { label: "Unshared", value: (s) => s.own, shown: (s) => bytes(s.own) },
    { label: "Segments", value: (s) => s.segments, shown: (s) => count.format(s.segments) },
    { label: "Hits", value: (s) => s.hits, shown: (s) => count.format(s.hits) },
    { label: "Last used", value: (s) => s.used, shown: (s) => age(data.now - s.used) },
    { label: "Model", value: (s) => s.model.toLowerCase(), kind: "word wrap", shown: (s) => s.model },
    { label: "Fidelity", value: (s) => s.fidelity, kind: "word wrap", shown: (s) => s.fidelity },
    { label: "State", value: state, kind: "word", shown: state },
  ];
  const PAGE = 50;
  const view = { column: 7, down: true, page: 0, rows: sequences };
  columns.forEach((column, i) => {
    const head = make("th", column.kind && column.kind.includes("word") ? "word" : "");
    head.scope = "col";
    const button = make("button", "", column.label);
    button.type = "button";
    button.addEventListener("click", () => {
      view.down = view.column === i ? !view.down : !(column.kind || "").includes("word");
      view.column = i;
      sort();
    });
    head.append(button);
    $("table").tHead.rows[0].append(head);
  });
  const sort = () => {
    const value = columns[view.column].value;
    const compare = (a, b) => (a < b ? -1 : a > b ? 1 : 0);
    view.rows.sort((a, b) => (view.down ? -1 : 1) * compare(value(a), value(b)) || compare(a.key, b.key));
    view.page = 0;
    show();
  };
  const filter = () => {
    const wanted = $("filter").value.toLowerCase().split(/\s+/).filter(Boolean);
    const of = (s) => (word) => s.text.includes(word) || (word.length >= 4 && s.key.startsWith(word.slice(0, s.key.length)));
    view.rows = sequences.filter((s) => wanted.every(of(s)));
    sort();
  };
  const show = () => {
    [...$("table").tHead.rows[0].cells].forEach((head, i) => {
      const sorted = i === view.column;
      head.setAttribute("aria-sort", sorted ? (view.down ? "descending" : "ascending") : "none");
      head.firstChild.textContent = columns[i].label + (sorted ? (view.down ? " \u2193" : " \u2191") : "");
    });
    const from = view.page * PAGE;
    const body = make("tbody");
    for (const s of view.rows.slice(from, from + PAGE)) {
      const row = body.insertRow();
      for (const column of columns) {
        const cell = make("td", column.kind || "");
        if (column.leads && column.leads(s) && s.last >= 0) {
          const button = make("button", "", column.shown(s));
          button.type = "button";
          button.title = "Show in the prefix tree";
          button.addEventListener("click", () => reveal(s.last));
          cell.append(button);
        } else cell.textContent = column.shown(s);
        if (column.label === "State" && s.damaged) cell.classList.add("bad");
        row.append(cell);
      }
    }
    $("table").tBodies[0].replaceWith(body);
    const to = Math.min(view.rows.length, from + PAGE);
    $("count").textContent = view.rows.length === sequences.length
      ? plural(sequences.length, "sequence")
      : `${count.format(view.rows.length)} of ${plural(sequences.length, "sequence")}`;
    $("which").textContent = view.rows.length ? `${count.format(from + 1)} to ${count.format(to)}` : "none";
    $("previous").disabled = view.page === 0;
    $("next").disabled = to >= view.rows.length;
    $("previous").parentElement.hidden = view.rows.length <= PAGE && view.page === 0;
  };
  $("filter").addEventListener("input", filter);
  $("previous").addEventListener("click", () => { view.page -= 1; show(); });
  $("next").addEventListener("click", () => { view.page += 1; show(); });
  sort();

  // -- the prefix tree: items are made when what holds them is unfolded

  const SOME = 100;
  const segments = data.segments.map((s, i) => ({
    i, parent: s[0], start: s[1], tokens: s[2], disk: s[3], hits: s[4], through: s[5], codecs: data.ways[s[6]], problem: s[7],
    children: [], ends: [],
  }));
  const roots = [];
  for (const s of segments) (s.parent < 0 ? roots : segments[s.parent].children).push(s);
  for (const s of sequences) if (s.last >= 0) segments[s.last].ends.push(s);
  const order = (list) => list.sort((a, b) => b.through - a.through || b.tokens - a.tokens || a.i - b.i);
  // A run of segments without a branch or an end between them is one item.
  const run = (first) => {
    const found = [first];
    let last = first;
    while (last.children.length === 1 && !last.ends.length && found.length < 100000) {
      last = last.children[0];
      found.push(last);
    }
    return found;
  };
  const items = new Map();
  const item = (first) => {
    const all = run(first);
    const last = all[all.length - 1];
    const made = make("li");
    made.setAttribute("role", "treeitem");
    made.tabIndex = -1;
    const row = make("span", "row");
    const stop = last.start + last.tokens;
    for (const s of last.ends.slice(0, 8)) row.append(make("b", "", s.name || s.key.slice(0, 8)), "  ");
    if (last.ends.length > 8) row.append(`and ${plural(last.ends.length - 8, "other")}  `);
    const hits = all.reduce((sum, s) => sum + (s.hits || 0), 0);
    row.append(make("span", "soft", [
      `tokens ${count.format(first.start)} to ${count.format(stop - 1)}`, plural(all.length, "segment"),
      bytes(all.reduce((sum, s) => sum + s.disk, 0)), plural(first.through, "sequence"), plural(hits, "hit"), last.codecs,
    ].filter(Boolean).join(" \u00b7 ")));
    for (const s of all) {
      items.set(s.i, made);
      if (s.problem) row.append(" ", make("span", "bad", `damaged: ${s.problem}`));
    }
    made.append(row);
    made.children_ = order(last.children);
    if (made.children_.length) made.setAttribute("aria-expanded", "false");
    return made;
  };
  const fill = (list, some, from) => {
    for (const s of some.slice(from, from + SOME)) list.append(item(s));
    if (some.length > from + SOME) {
      const more = make("li");
      more.setAttribute("role", "treeitem");
      more.tabIndex = -1;
      more.append(make("span", "row soft", `show ${count.format(Math.min(SOME, some.length - from - SOME))} more of ${count.format(some.length)}`));
      more.more = () => { more.remove(); fill(list, some, from + SOME); };
      list.append(more);
    }
  };
  const open = (made) => {
    if (made.getAttribute("aria-expanded") !== "false") return;
    made.setAttribute("aria-expanded", "true");
    if (made.lastChild.tagName === "UL") made.lastChild.hidden = false;
    else {
      const list = make("ul");
      list.setAttribute("role", "group");
      fill(list, made.children_, 0);
      made.append(list);
    }
  };
  const close = (made) => {
    if (made.getAttribute("aria-expanded") !== "true") return;
    made.setAttribute("aria-expanded", "false");
    made.lastChild.hidden = true;
  };
  const list = $("list");
  order(roots);
  fill(list, roots, 0);
  if (!roots.length) list.append(make("li", "soft", "Nothing is stored."));
  let current = list.querySelector("[role=treeitem]");
  if (current) current.tabIndex = 0;
  const focus = (made) => {
    if (!made) return;
    if (current) current.tabIndex = -1;
    current = made;
    current.tabIndex = 0;
    current.focus();
  };
  const more = (made) => {
    const before = made.previousElementSibling;
    made.more();
    focus(before ? before.nextElementSibling : list.firstElementChild);
  };
  list.addEventListener("click", (event) => {
    const made = event.target.closest("[role=treeitem]");
    if (!made) return;
    if (made.more) { more(made); return; }
    if (made.getAttribute("aria-expanded") === "true") close(made); else open(made);
    focus(made);
  });
  list.addEventListener("keydown", (event) => {
    const made = event.target.closest("[role=treeitem]");
    if (!made) return;
    const shown = [...list.querySelectorAll("[role=treeitem]")].filter((each) => !each.parentElement.closest("[hidden]"));
    const at = shown.indexOf(made);
    const above = made.parentElement.closest("[role=treeitem]");
    const does = {
      ArrowDown: () => focus(shown[at + 1]),
      ArrowUp: () => focus(shown[at - 1]),
      Home: () => focus(shown[0]),
      End: () => focus(shown[shown.length - 1]),
      ArrowRight: () => {
        if (made.getAttribute("aria-expanded") === "true") focus(made.querySelector("[role=treeitem]")); else open(made);
      },
      ArrowLeft: () => { if (made.getAttribute("aria-expanded") === "true") close(made); else focus(above); },
      Enter: () => { if (made.more) more(made); else if (made.getAttribute("aria-expanded") === "true") close(made); else open(made); },
    }[event.key];
    if (!does) return;
    event.preventDefault();
    does();
  });
  $("fold").addEventListener("click", () => { for (const made of list.querySelectorAll("[aria-expanded=true]")) close(made); });
  $("unfold").addEventListener("click", () => {
    for (let level = 0; level < 2; level += 1) for (const made of [...list.querySelectorAll("[aria-expanded=false]")].slice(0, 200)) open(made);
  });
  // Unfolds what leads to a segment, and goes there.
  const reveal = (segment) => {
    const path = [];
    for (let s = segment, steps = 0; s >= 0 && steps <= segments.length; s = segments[s].parent, steps += 1) path.unshift(s);
    let holder = null;
    for (const s of path) {
      if (!items.has(s)) {
        const some = holder ? holder.children_ : roots;
        if (holder) open(holder);
        let end = (holder ? holder.lastChild : list).lastElementChild;
        while (!items.has(s) && end && end.more && some.length) { end.more(); end = (holder ? holder.lastChild : list).lastElementChild; }
      }
      holder = items.get(s) || holder;
      if (holder && s !== path[path.length - 1] && items.get(path[path.indexOf(s) + 1]) !== holder) open(holder);
    }
    for (const before of list.querySelectorAll(".found")) before.classList.remove("found");
    if (!holder) return;
    holder.classList.add("found");
    focus(holder);
    holder.scrollIntoView({ block: "center" });
  };

  // -- heat maps: the value under the pointer, or under a cursor that arrow keys move

  const SVG = "http://www.w3.org/2000/svg";
  for (const [name, grid] of Object.entries(data.grids)) {
    const svg = $(name);
    const [left, top, wide, high] = svg.querySelector(".cells").dataset.cells.split(" ").map(Number);
    const said = svg.closest("figure").querySelector("output");
    const last = { x: grid.bounds.length - 2, y: grid.rows.length - 1 };
    const at = { x: 0, y: 0 };
    const cursors = ["cursor", "cursor inner"].map((kind) => {
      const made = document.createElementNS(SVG, "rect");
      made.setAttribute("class", kind);
      made.setAttribute("width", (wide / (last.x + 1)).toFixed(2));
      made.setAttribute("height", (high / (last.y + 1)).toFixed(2));
      made.setAttribute("visibility", "hidden");
      svg.append(made);
      return made;
    });
    const tell = (x, y) => {
      at.x = Math.max(0, Math.min(last.x, x));
      at.y = Math.max(0, Math.min(last.y, y));
      for (const cursor of cursors) {
        cursor.setAttribute("x", (left + (wide * at.x) / (last.x + 1)).toFixed(2));
        cursor.setAttribute("y", (top + (high * at.y) / (last.y + 1)).toFixed(2));
        cursor.setAttribute("visibility", "visible");
      }
      const value = grid.values[at.y][at.x];
      const [start, stop] = [grid.bounds[at.x], grid.bounds[at.x + 1] - 1];
      const where = stop > start ? `${grid.across}s ${count.format(start)} to ${count.format(stop)}` : `${grid.across} ${count.format(start)}`;
      const number = value === null ? "could not be read" : grid.unit === "B" ? bytes(value) : value.toPrecision(4);
      said.textContent = `layer ${grid.rows[at.y]}, ${where}: ${number}`;
    };
    svg.addEventListener("pointermove", (event) => {
      const place = new DOMPoint(event.clientX, event.clientY).matrixTransform(svg.getScreenCTM().inverse());
      const [x, y] = [(place.x - left) / wide, (place.y - top) / high];
      if (x < 0 || y < 0 || x >= 1 || y >= 1) return;
      tell(Math.floor(x * (last.x + 1)), Math.floor(y * (last.y + 1)));
    });
    svg.addEventListener("focus", () => tell(at.x, at.y));
    svg.addEventListener("keydown", (event) => {
      const far = event.shiftKey ? 8 : 1;
      const step = { ArrowRight: [far, 0], ArrowLeft: [-far, 0], ArrowDown: [0, far], ArrowUp: [0, -far] }[event.key];
      if (step) tell(at.x + step[0], at.y + step[1]);
      else if (event.key === "Home") tell(0, at.y);
      else if (event.key === "End") tell(last.x, at.y);
      else return;
      event.preventDefault();
    });
    svg.setAttribute("aria-roledescription", "heat map, arrow keys read its cells");
    said.setAttribute("aria-live", "polite");
  }
  if ($("mapped")) {
    const choose = () => { for (const each of document.querySelectorAll(".mapped")) each.hidden = each.dataset.map !== $("mapped").value; };
    $("mapped").addEventListener("change", choose);
    choose();
  }
})();
