"use strict";
const filters = document.querySelector("#filters");
if (filters) {
  const claims = [...document.querySelectorAll("tbody.claim")];
  const apply = () => {
    const { subject, verdict } = Object.fromEntries(new FormData(filters));
    const shown = new Set();
    let count = 0, all = 0;
    for (const claim of claims) {
      const rows = [...claim.rows];
      const fits = (row) => !verdict || row.dataset.verdict === verdict;
      const ours = !subject || claim.dataset.subject === subject;
      const kept = ours ? rows.filter(fits).length : 0;
      claim.hidden = kept === 0;
      // A row that does not fit stays beside its claim's others, dimmed: the claim's cell spans them all.
      rows.forEach((row) => row.classList.toggle("dim", !fits(row)));
      if (kept) shown.add(claim.dataset.subject);
      count += kept;
      all += rows.length;
    }
    for (const method of document.querySelectorAll("tbody.method")) {
      method.hidden = !shown.has(method.dataset.subject);
    }
    filters.querySelector("output").textContent = `${count} of ${all} shown`;
  };
  filters.hidden = false;
  filters.addEventListener("input", apply);
  filters.addEventListener("submit", (event) => event.preventDefault());
  apply();
}
