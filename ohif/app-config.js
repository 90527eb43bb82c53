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

  window.config = {
    name: 'lightbox',
    routerBasename: null,
    extensions: [],
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
