// Run the search worker in a hidden frame when the site is opened from the disk: browsers start no workers
// from file:// pages. The theme's offline plugin would load such a script from the network.
(() => {
  if (location.protocol !== "file:") return

  window.Worker = class extends EventTarget {
    constructor(url) {
      super()
      const frame = document.createElement("iframe")
      frame.hidden = true
      document.body.appendChild(frame)
      this.frame = frame
      this.inner = frame.contentWindow
      const page = this.inner.document
      page.open()
      page.write("<!doctype html><html><head></head><body></body></html>")
      page.close()
      this.inner.postMessage = data => setTimeout(() => {
        const message = new MessageEvent("message", { data })
        this.dispatchEvent(message)
        if (this.onmessage) this.onmessage(message)
      })
      this.inner.importScripts = (...sources) =>
        sources.reduce((before, source) => before.then(() => this.load(source)), Promise.resolve())
      this.ready = this.load(url)
    }

    load(source) {
      const script = this.inner.document.createElement("script")
      script.src = source
      return new Promise((resolve, reject) => {
        script.onload = resolve
        script.onerror = reject
        this.inner.document.body.appendChild(script)
      })
    }

    postMessage(data) {
      this.ready.then(() => this.inner.dispatchEvent(new MessageEvent("message", { data })))
    }

    terminate() {
      this.frame.remove()
    }
  }
})()
