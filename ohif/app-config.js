/* How Lightbox sets up OHIF 3.13.2. Served by the edge in place of the one OHIF ships, which
 * points at a public demo server.
 *
 * The page's address is /viewer?StudyInstanceUIDs=<uid>[,<uid>...]&ctx=<ctx>, where ctx names
 * the launch session. It is no secret and opens nothing: the HttpOnly cookie that was set for
 * /s/<ctx>/ does. Everything this viewer asks for lies under /s/<ctx>/ on its own origin.
 *
 * Never add a dicomjson, dicomwebproxy or dicomlocal source, customizationUrlPrefixes or
 * dangerouslyUseDynamicConfig: a crafted link could then make the viewer read elsewhere.
 */
(function () {
  'use strict';

  const CTX = /^[A-Za-z0-9_-]{16,64}$/;

  /* The session's own path, or null if the address names no session. */
  function sessionRoot(query) {
    const ctx = query.get('ctx');
    return ctx !== null && CTX.test(ctx) ? '/s/' + ctx : null;
  }

  const root = sessionRoot(new URLSearchParams(window.location.search));

  /* Leaves for the page on which the app says why this viewer no longer shows anything. */
  let leaving = false;
  function leave() {
    if (!leaving) {
      leaving = true;
      window.location.replace(root === null ? '/' : root + '/ended');
    }
  }

  /* Is the session alive? 204 means yes. Only a definite no ends the viewer: an app that is
   * down for a moment (503) or a network that hiccups must not take the images away. */
  let asking = null;
  function checkSession() {
    if (root === null) {
      leave();
      return;
    }
    asking ??= fetch(root + '/status', { cache: 'no-store', credentials: 'same-origin' })
      .then(function (answer) {
        if ([401, 403, 404, 410].includes(answer.status)) {
          leave();
        }
      })
      .catch(function () {})
      .finally(function () {
        asking = null;
      });
  }
  checkSession();

  /* ---- Somebody is there
   *
   * Whoever reads may ask for nothing for an hour: all images are loaded. So the page sends a sign
   * of life while a person moved, typed, scrolled or touched in the last minute, and none when
   * nobody is there: then the session is to end. The answer says how long it may still be open.
   */
  const LOOK_SECONDS = 20;
  const PRESENT_SECONDS = 60;
  let seen = Date.now(); /* Opening the page is the first sign. */
  let sent = 0;
  let closesAt = null;
  let warnSeconds = 0;
  let emergency = false;

  ['pointerdown', 'pointermove', 'keydown', 'wheel', 'touchstart'].forEach(function (kind) {
    window.addEventListener(
      kind,
      function (event) {
        if (event.isTrusted) {
          seen = Date.now();
        }
      },
      { capture: true, passive: true }
    );
  });

  let telling = false;
  function tellOfLife() {
    /* Only what came since the last sign of life is worth another. */
    if (root === null || telling || seen <= sent || Date.now() - seen > PRESENT_SECONDS * 1000) {
      return;
    }
    telling = true;
    const at = Date.now();
    fetch(root + '/alive', { cache: 'no-store', credentials: 'same-origin' })
      .then(function (answer) {
        if ([401, 403, 404, 410].includes(answer.status)) {
          leave();
          return null;
        }
        return answer.ok ? answer.json() : null;
      })
      .then(function (said) {
        if (said !== null) {
          sent = at;
          closesAt = at + said.seconds_left * 1000;
          warnSeconds = said.warn_seconds;
          emergency = said.purpose_of_use === 'BTG';
        }
      })
      .catch(function () {})
      .finally(function () {
        telling = false;
        showBanner();
      });
  }

  /* ---- It closes soon
   *
   * A note over the foot of the list of studies: the corners of the viewports hold what belongs to
   * the images, and the patient's name stands above them.
   */
  const LAST_SECONDS = 120; /* Put away before, it comes back for these. */
  let banner = null;
  let awaySince = Infinity; /* seconds left when it was put away */
  function showBanner() {
    const left = closesAt === null ? Infinity : Math.ceil((closesAt - Date.now()) / 1000);
    if (left <= 0) {
      checkSession();
    }
    const away = awaySince <= LAST_SECONDS || (awaySince < Infinity && left > LAST_SECONDS);
    if (left > warnSeconds || away || document.body === null) {
      banner?.remove();
      banner = null;
      return;
    }
    if (banner === null) {
      banner = makeBanner();
      document.body.append(banner);
    }
    const minutes = Math.max(1, Math.ceil(left / 60));
    const time = new Date(closesAt).toLocaleTimeString([], { hour: '2-digit', minute: '2-digit' });
    const what = emergency ? 'Your emergency access ends' : 'This viewer closes';
    const text =
      what + ' at ' + time + ', in ' + minutes + (minutes === 1 ? ' minute. ' : ' minutes. ') +
      'To go on reading, open the images again from the EHR.';
    const words = banner.firstChild;
    if (words.textContent !== text) {
      words.textContent = text;
    }
  }

  function makeBanner() {
    const made = document.createElement('div');
    made.id = 'lightbox-closes-soon';
    made.setAttribute('role', 'status');
    made.style.cssText =
      'position:fixed;left:12px;bottom:12px;z-index:2147483000;box-sizing:border-box;' +
      'display:flex;align-items:flex-end;gap:10px;width:256px;padding:10px 10px 10px 14px;' +
      'border:1px solid #f2b84b;border-radius:8px;background:#14183a;color:#f4f6fd;' +
      'font:14px/1.4 Inter,system-ui,sans-serif;box-shadow:0 4px 18px #000a';
    const words = document.createElement('span');
    const away = document.createElement('button');
    away.type = 'button';
    away.textContent = 'OK';
    away.setAttribute('aria-label', 'Put this notice away');
    away.style.cssText =
      'flex:none;padding:4px 12px;border:1px solid #5a6299;border-radius:6px;background:#232a5c;' +
      'color:#f4f6fd;font:inherit;cursor:pointer';
    away.addEventListener('click', function () {
      awaySince = Math.ceil((closesAt - Date.now()) / 1000);
      showBanner();
    });
    made.append(words, away);
    return made;
  }

  tellOfLife();
  window.setInterval(function () {
    tellOfLife();
    showBanner();
  }, LOOK_SECONDS * 1000);

  /* The page may come back from the browser's back-forward cache, or a sleeping laptop. */
  window.addEventListener('pageshow', function (event) {
    if (event.persisted) {
      checkSession();
    }
  });
  document.addEventListener('visibilitychange', function () {
    if (document.visibilityState === 'visible') {
      checkSession();
    }
  });

  /* OHIF makes seven WebGL contexts before it shows the first image. Two are as many as are seen
   * side by side, and without a graphics card each takes a tenth of a second. Cornerstone's own
   * extension has been registered before ours. */
  function useFewerContexts() {
    const cornerstone = window.cornerstone;
    if (cornerstone?.getConfiguration === undefined) {
      return;
    }
    const current = cornerstone.getConfiguration();
    cornerstone.setConfiguration({
      ...current,
      rendering: { ...current.rendering, webGlContextCount: 2 },
    });
  }

  window.config = {
    name: 'lightbox',
    routerBasename: null,
    extensions: [{ id: 'lightbox', preRegistration: useFewerContexts }],
    modes: [],
    /* No guided tour over the patient's images. */
    customizationService: { 'ohif.tours': { $set: [] } },
    /* `/` lists no studies: which ones may be seen is the EHR's to say. */
    showStudyList: false,
    /* Whose images these are stands above them, always. */
    showPatientInfo: 'visibleReadOnly',
    showLoadingIndicator: true,
    showCPUFallbackMessage: true,
    showWarningMessageForCrossOrigin: true,
    strictZSpacingForVolumeViewport: true,
    /* Stack traces tell a clinician nothing. */
    showErrorDetails: 'dev',
    /* OHIF is not cleared as a medical device, and says so. The reader puts the notice away
     * for 30 days; 'never' would hide it from people who have not read it. */
    investigationalUseDialog: { option: 'configure', days: 30 },
    maxNumberOfWebWorkers: 3,
    /* A browser opens six connections to an origin over HTTP/1.1. More requests at once only
     * queue there, where one that the user waits for cannot overtake. */
    maxNumRequests: { interaction: 100, thumbnail: 5, prefetch: 10 },
    studyPrefetcher: { enabled: false },
    /* OHIF calls this for each failed DICOMweb search or metadata request. */
    httpErrorHandler: function (request) {
      if ([401, 403, 404].includes(request.status)) {
        checkSession();
      }
    },
    defaultDataSourceName: 'lightbox',
    dataSources: [
      {
        namespace: '@ohif/extension-default.dataSourcesModule.dicomweb',
        sourceName: 'lightbox',
        configuration: {
          friendlyName: 'Lightbox',
          name: 'lightbox',
          qidoSupportsIncludeField: true,
          supportsFuzzyMatching: false,
          supportsWildcard: false,
          supportsReject: false,
          dicomUploadEnabled: false,
          supportsStow: false,
          imageRendering: 'wadors',
          thumbnailRendering: 'wadors',
          enableStudyLazyLoad: true,
          omitQuotationForMultipartRequest: true,
          /* Frames without a multipart envelope, which the browser would have to take apart: the
           * last of 200 arrives a fifth earlier. What comes as parts only, still does. */
          acceptHeader: ['application/octet-stream; transfer-syntax=*', '*/*;q=0.1'],
          singlepart: 'bulkdata,video',
          bulkDataURI: { enabled: true, relativeResolution: 'studies' },
          onConfiguration: function (configuration, options) {
            /* Once the viewer has changed its own address, the page still knows its session. */
            const own = sessionRoot(options.query) ?? root;
            const dicomWeb = (own ?? '/s/none') + '/dicom-web';
            return {
              ...configuration,
              qidoRoot: dicomWeb,
              wadoRoot: dicomWeb,
              wadoUriRoot: dicomWeb,
            };
          },
        },
      },
    ],
  };
})();
