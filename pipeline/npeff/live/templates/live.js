// Without this script, every form works by its button. With it, the result is shown while the form is changed.
for (const form of document.querySelectorAll("form[data-live]")) {
  const target = form.dataset.live;
  let waiting, asked;
  const show = async () => {
    asked?.abort();
    asked = new AbortController();
    const given = [...new FormData(form)].filter(([, value]) => value !== "");
    const address = `${form.getAttribute("action")}?${new URLSearchParams(given)}`;
    try {
      const answer = await fetch(address, { signal: asked.signal });
      const page = new DOMParser().parseFromString(await answer.text(), "text/html");
      const found = page.querySelector(target);
      if (!found) return;
      document.querySelector(target).replaceWith(found);
      history.replaceState(null, "", address);
    } catch (error) {
      if (error.name !== "AbortError") form.submit();
    }
  };
  form.addEventListener("input", () => {
    clearTimeout(waiting);
    waiting = setTimeout(show, 120);
  });
}

// A slider shows its value.
for (const slider of document.querySelectorAll('input[type="range"]')) {
  const shown = slider.parentElement.querySelector("output");
  const say = () => {
    if (shown) shown.textContent = Number(slider.value).toFixed(2).replace("-", "−");
  };
  slider.addEventListener("input", say);
  say();
}
