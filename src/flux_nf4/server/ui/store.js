// Small things that survive a reload, with `area` "sessionStorage" in this tab alone. Where storage
// is switched off the page works without.
const PREFIX = "flux-nf4.";

export function recall(name, area = "localStorage") {
  try {
    return JSON.parse(window[area].getItem(PREFIX + name));
  } catch {
    return null;
  }
}

export function remember(name, value, area = "localStorage") {
  try {
    window[area].setItem(PREFIX + name, JSON.stringify(value));
  } catch {
    // Full or switched off: forgetting is all that happens.
  }
}
