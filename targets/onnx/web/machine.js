/** What a browser says of itself and of the machine below it. */

const ARCHS = { "x86 64": "x86_64", "x86 32": "x86", "arm 64": "aarch64", "arm 32": "arm" };
const HINTS = ["architecture", "bitness", "fullVersionList", "model", "platformVersion"];

/** { device, arch, os }; where a browser tells nothing (Firefox, Safari, http over a network), what its name tells. */
export async function machine() {
  const said = await navigator.userAgentData?.getHighEntropyValues(HINTS);
  if (!said) return named(navigator.userAgent);
  const brands = said.fullVersionList.filter(({ brand }) => !/Not.?A.?Brand/i.test(brand));
  const { brand, version } = brands.find(({ brand }) => brand !== "Chromium") ?? brands[0];
  return {
    device: [said.model, `${brand} ${version}`].filter(Boolean).join(", "),
    arch: ARCHS[`${said.architecture} ${said.bitness}`] ?? "unknown",
    os: [said.platform, said.platformVersion].filter(Boolean).join(" "),
  };
}

/** The same from a user agent's string, whose processor and versions may be those of long ago. */
function named(agent) {
  const browser = agent.match(/(Firefox|EdgA?|CriOS|FxiOS|Chrome|Version)\/([\d.]+)/);
  const system = agent.match(/\(([^)]*)\)/)?.[1].split(";").slice(0, 2).map((part) => part.trim());
  const name = browser?.[1] === "Version" ? "Safari" : browser?.[1];
  return {
    device: browser ? `${name} ${browser[2]}` : "browser",
    arch: "unknown",
    os: system?.join(" ") ?? "unknown",
  };
}

/** The GPU that WebGPU offers: { name, software }; an error when it offers none. */
export async function gpu() {
  const adapter = await navigator.gpu?.requestAdapter();
  if (!adapter) throw new Error(`webgpu: expected a GPU, found ${navigator.gpu ? "none" : "no navigator.gpu"}`);
  const { vendor, architecture, description, isFallbackAdapter } = adapter.info;
  const software = Boolean(isFallbackAdapter) || /swiftshader|llvmpipe/i.test(`${architecture} ${description}`);
  return { name: [vendor, architecture].filter(Boolean).join(" ") || "GPU", software };
}
