// The viewer's configuration, read before its bundle (OHIF 3.13.2 below /viewer/). Same origin as DICOMweb: the
// session cookie travels by itself and no token is in JavaScript. dicomwebproxy and dicomjson, which would take
// an address from a link, are not among the data sources.
(() => {
  // A viewer asks for a patient's other studies by a bare Patient ID, and two hospitals may both use 123. So the
  // root of its questions names the study that was opened, and the server binds them to that study's person.
  const opened = (new URLSearchParams(location.search).get('StudyInstanceUIDs') || '').split(/[,\\]/)[0];
  const root = /^[0-9.]{1,64}$/.test(opened) ? '/dicom-web/for/' + opened : '/dicom-web';

  window.config = {
    name: 'miss',
    routerBasename: '/viewer',
    extensions: [],
    modes: [],
    customizationService: [{ 'ohif.tours': { $set: [] } }],
    showStudyList: false,
    maxNumberOfWebWorkers: 2,
    maxNumRequests: { interaction: 100, thumbnail: 5, prefetch: 25 },
    showLoadingIndicator: true,
    showWarningMessageForCrossOrigin: true,
    showCPUFallbackMessage: true,
    strictZSpacingForVolumeViewport: true,
    showErrorDetails: 'always',
    whiteLabeling: {
      createLogoComponentFn: React =>
        React.createElement(
          'a', { href: '/studies', style: { color: '#8ecbff', fontWeight: 600, padding: '0 8px' } }, 'MISS · Studies'),
    },
    httpErrorHandler: error => {
      if (error.status === 401) {
        location.assign('/login?next=' + encodeURIComponent(location.pathname + location.search));
      }
    },
    defaultDataSourceName: 'dicomweb',
    dataSources: [
      {
        namespace: '@ohif/extension-default.dataSourcesModule.dicomweb',
        sourceName: 'dicomweb',
        configuration: {
          friendlyName: 'MISS',
          name: 'miss',
          qidoRoot: root,
          wadoRoot: root,
          wadoUriRoot: '/wado',
          qidoSupportsIncludeField: true,
          supportsFuzzyMatching: false,
          supportsWildcard: true,
          imageRendering: 'wadors',
          thumbnailRendering: 'wadors',
          enableStudyLazyLoad: true,
          omitQuotationForMultipartRequest: true,
          bulkDataURI: { enabled: true },
        },
      },
    ],
  };
})();
