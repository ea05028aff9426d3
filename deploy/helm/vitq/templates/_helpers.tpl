{{- define "vitq.name" -}}
{{- if contains .Chart.Name .Release.Name -}}
{{- .Release.Name | trunc 50 | trimSuffix "-" -}}
{{- else -}}
{{- printf "%s-%s" .Release.Name .Chart.Name | trunc 50 | trimSuffix "-" -}}
{{- end -}}
{{- end -}}

{{/* Arguments: root, role. */}}
{{- define "vitq.selector" -}}
app.kubernetes.io/name: vitq
app.kubernetes.io/instance: {{ .root.Release.Name }}
app.kubernetes.io/component: {{ .role }}
{{- end -}}

{{- define "vitq.labels" -}}
{{ include "vitq.selector" . }}
app.kubernetes.io/version: {{ .root.Chart.AppVersion | quote }}
app.kubernetes.io/managed-by: {{ .root.Release.Service }}
helm.sh/chart: {{ printf "%s-%s" .root.Chart.Name .root.Chart.Version }}
{{- end -}}

{{/* Arguments: root, gpu. */}}
{{- define "vitq.image" -}}
{{- with .root.Values.image -}}
{{- if .digest -}}
{{ .repository }}@{{ .digest }}
{{- else -}}
{{ .repository }}:{{ .tag | default $.root.Chart.AppVersion }}{{ if $.gpu }}-cuda{{ end }}
{{- end -}}
{{- end -}}
{{- end -}}

{{/* Mistakes that no schema finds. */}}
{{- define "vitq.check" -}}
{{- $v := .Values -}}
{{- if not (or $v.tls.secretName $v.insecure) -}}
{{- fail "set tls.secretName, or insecure: true where the network itself is trusted (docs/security.md)" -}}
{{- end -}}
{{- if and (not $v.tls.secretName) $v.tls.clientCaSecretName -}}
{{- fail "tls.clientCaSecretName needs tls.secretName" -}}
{{- end -}}
{{- if $v.database.secretName -}}
{{- if not $v.store.url -}}{{- fail "servers that share a database need a store.url, too" -}}{{- end -}}
{{- if and (eq (int $v.server.workers) 0) (not $v.worker.enabled) -}}
{{- fail "nobody would run jobs: set worker.enabled, or server.workers to at least 1" -}}
{{- end -}}
{{- else -}}
{{- if $v.store.url -}}{{- fail "a store.url without database.secretName" -}}{{- end -}}
{{- if or $v.worker.enabled $v.autoscaling.server.enabled $v.autoscaling.worker.enabled (gt (int $v.server.replicas) 1) -}}
{{- fail "several pods need database.secretName and store.url" -}}
{{- end -}}
{{- end -}}
{{- range $key, $_ := $v.config -}}
{{- if has $key (list "listen" "ops-listen" "config" "data-dir" "cache-dir" "cache-bytes" "database" "store" "checkpoints" "datasets" "workers" "preload" "drain-delay" "drain-timeout" "tls-cert" "tls-key" "tls-client-ca" "tokens" "jwt-issuer" "jwt-audience" "jwt-key" "insecure") -}}
{{- fail (printf "config.%s: the chart sets it from a value of its own" $key) -}}
{{- end -}}
{{- end -}}
{{- end -}}

{{/* Flags of both commands. */}}
{{- define "vitq.sharedArgs" -}}
- --config=/etc/vitq/vitq.toml
- --ops-listen=0.0.0.0:9000
- --data-dir=/var/lib/vitq
- --cache-dir=/var/cache/vitq
- --cache-bytes={{ .Values.cache.bytes | int64 }}
{{- with .Values.store.url }}
- --store={{ . }}
{{- end }}
{{- if .Values.checkpoints.existingClaim }}
- --checkpoints=/mnt/checkpoints
{{- end }}
{{- if .Values.datasets.existingClaim }}
- --datasets=/mnt/datasets
{{- end }}
{{- end -}}

{{/* Flags of servers alone. */}}
{{- define "vitq.serverArgs" -}}
- --listen=0.0.0.0:50051
{{- with .Values.server }}
- --drain-delay={{ .drain.delaySeconds }}
- --drain-timeout={{ .drain.timeoutSeconds }}
{{- with .preload }}
- --preload={{ join "," . }}
{{- end }}
{{- end }}
- --workers={{ if .Values.database.secretName }}{{ .Values.server.workers }}{{ else }}{{ max 1 (int .Values.server.workers) }}{{ end }}
{{- if .Values.tls.secretName }}
- --tls-cert=/etc/vitq/tls/tls.crt
- --tls-key=/etc/vitq/tls/tls.key
{{- if .Values.tls.clientCaSecretName }}
- --tls-client-ca=/etc/vitq/client-ca/ca.crt
{{- end }}
{{- end }}
{{- if .Values.insecure }}
- --insecure
{{- end }}
{{- if .Values.tokens.secretName }}
- --tokens=/etc/vitq/tokens/{{ .Values.tokens.secretKey }}
{{- end }}
{{- if .Values.jwt.secretName }}
- --jwt-issuer={{ .Values.jwt.issuer }}
- --jwt-audience={{ .Values.jwt.audience }}
- --jwt-key=/etc/vitq/jwt/{{ .Values.jwt.secretKey }}
{{- end }}
{{- end -}}

{{/* The pod of a role. Arguments: root, role, settings (of the role), command, args, grace. */}}
{{- define "vitq.pod" -}}
{{- $v := .root.Values -}}
{{- $gpu := .settings.gpu.enabled -}}
metadata:
  labels:
    {{- include "vitq.labels" . | nindent 4 }}
  annotations:
    checksum/config: {{ toJson $v.config | sha256sum }}
    {{- with .settings.podAnnotations }}
    {{- toYaml . | nindent 4 }}
    {{- end }}
spec:
  serviceAccountName: {{ include "vitq.name" .root }}
  automountServiceAccountToken: false
  enableServiceLinks: false
  terminationGracePeriodSeconds: {{ .grace }}
  {{- with $v.priorityClassName }}
  priorityClassName: {{ . }}
  {{- end }}
  {{- with $v.image.pullSecrets }}
  imagePullSecrets:
    {{- toYaml . | nindent 4 }}
  {{- end }}
  {{- if and $gpu $v.gpu.runtimeClassName }}
  runtimeClassName: {{ $v.gpu.runtimeClassName }}
  {{- end }}
  {{- with merge (dict) .settings.nodeSelector (ternary $v.gpu.nodeSelector (dict) $gpu) }}
  nodeSelector:
    {{- toYaml . | nindent 4 }}
  {{- end }}
  {{- with concat .settings.tolerations (ternary $v.gpu.tolerations (list) $gpu) }}
  tolerations:
    {{- toYaml . | nindent 4 }}
  {{- end }}
  {{- with .settings.affinity }}
  affinity:
    {{- toYaml . | nindent 4 }}
  {{- end }}
  topologySpreadConstraints:
    - maxSkew: 1
      topologyKey: kubernetes.io/hostname
      whenUnsatisfiable: ScheduleAnyway
      labelSelector:
        matchLabels:
          {{- include "vitq.selector" . | nindent 10 }}
  securityContext:
    runAsNonRoot: true
    runAsUser: 10001
    runAsGroup: 10001
    fsGroup: 10001
    fsGroupChangePolicy: OnRootMismatch
    seccompProfile: {type: RuntimeDefault}
  containers:
    - name: vitq
      image: {{ include "vitq.image" (dict "root" .root "gpu" $gpu) }}
      imagePullPolicy: {{ $v.image.pullPolicy }}
      args:
        - {{ .command }}
        {{- include "vitq.sharedArgs" .root | nindent 8 }}
        {{- .args | nindent 8 }}
        {{- with .settings.extraArgs }}
        {{- toYaml . | nindent 8 }}
        {{- end }}
      env:
        # libtorch would take as many threads as the node has cores.
        - name: OMP_NUM_THREADS
          valueFrom:
            resourceFieldRef: {resource: requests.cpu, divisor: "1"}
        {{- if $v.database.secretName }}
        - name: VITQ_DATABASE
          valueFrom:
            secretKeyRef: {name: {{ $v.database.secretName }}, key: {{ $v.database.secretKey }}}
        {{- end }}
        {{- with $v.extraEnv }}
        {{- toYaml . | nindent 8 }}
        {{- end }}
      {{- if or $v.store.secretName $v.extraEnvFrom }}
      envFrom:
        {{- with $v.store.secretName }}
        - secretRef: {name: {{ . }}}
        {{- end }}
        {{- with $v.extraEnvFrom }}
        {{- toYaml . | nindent 8 }}
        {{- end }}
      {{- end }}
      ports:
        {{- if eq .role "server" }}
        - {name: grpc, containerPort: 50051}
        {{- end }}
        - {name: ops, containerPort: 9000}
      # Ten minutes to reach the stores and to load what is to be preloaded.
      startupProbe:
        grpc: {port: 9000}
        periodSeconds: 5
        failureThreshold: 120
      readinessProbe:
        grpc: {port: 9000}
        periodSeconds: 5
      livenessProbe:
        grpc: {port: 9000, service: liveness}
        periodSeconds: 10
        failureThreshold: 3
      {{- $resources := deepCopy .settings.resources }}
      {{- $requests := merge ($resources.requests | default dict) (dict "ephemeral-storage" $v.cache.size) }}
      {{- $resources = merge (dict "requests" $requests) $resources }}
      {{- if $gpu }}
      {{- $limits := merge (dict $v.gpu.resource .settings.gpu.count) ($resources.limits | default dict) }}
      {{- $resources = merge (dict "limits" $limits) $resources }}
      {{- end }}
      resources:
        {{- toYaml $resources | nindent 8 }}
      securityContext:
        allowPrivilegeEscalation: false
        readOnlyRootFilesystem: true
        capabilities: {drop: [ALL]}
      volumeMounts:
        - {name: config, mountPath: /etc/vitq/vitq.toml, subPath: vitq.toml, readOnly: true}
        - {name: data, mountPath: /var/lib/vitq}
        - {name: cache, mountPath: /var/cache/vitq}
        - {name: tmp, mountPath: /tmp}
        {{- range $name := list "checkpoints" "datasets" }}
        {{- if (index $v $name).existingClaim }}
        - {name: {{ $name }}, mountPath: /mnt/{{ $name }}, readOnly: true}
        {{- end }}
        {{- end }}
        {{- if eq .role "server" }}
        {{- if $v.tls.secretName }}
        - {name: tls, mountPath: /etc/vitq/tls, readOnly: true}
        {{- end }}
        {{- if $v.tls.clientCaSecretName }}
        - {name: client-ca, mountPath: /etc/vitq/client-ca, readOnly: true}
        {{- end }}
        {{- if $v.tokens.secretName }}
        - {name: tokens, mountPath: /etc/vitq/tokens, readOnly: true}
        {{- end }}
        {{- if $v.jwt.secretName }}
        - {name: jwt, mountPath: /etc/vitq/jwt, readOnly: true}
        {{- end }}
        {{- end }}
        {{- with $v.extraVolumeMounts }}
        {{- toYaml . | nindent 8 }}
        {{- end }}
  volumes:
    - name: config
      configMap: {name: {{ include "vitq.name" .root }}}
    - name: data
      {{- if $v.database.secretName }}
      emptyDir: {}
      {{- else }}
      persistentVolumeClaim:
        claimName: {{ $v.persistence.existingClaim | default (printf "%s-data" (include "vitq.name" .root)) }}
      {{- end }}
    - name: cache
      emptyDir: {sizeLimit: {{ $v.cache.size }}}
    - name: tmp
      emptyDir: {sizeLimit: 1Gi}
    {{- range $name := list "checkpoints" "datasets" }}
    {{- with (index $v $name).existingClaim }}
    - name: {{ $name }}
      persistentVolumeClaim: {claimName: {{ . }}, readOnly: true}
    {{- end }}
    {{- end }}
    {{- if eq .role "server" }}
    {{- with $v.tls.secretName }}
    - name: tls
      secret: {secretName: {{ . }}}
    {{- end }}
    {{- with $v.tls.clientCaSecretName }}
    - name: client-ca
      secret: {secretName: {{ . }}}
    {{- end }}
    {{- with $v.tokens.secretName }}
    - name: tokens
      secret: {secretName: {{ . }}}
    {{- end }}
    {{- with $v.jwt.secretName }}
    - name: jwt
      secret: {secretName: {{ . }}}
    {{- end }}
    {{- end }}
    {{- with $v.extraVolumes }}
    {{- toYaml . | nindent 4 }}
    {{- end }}
{{- end -}}
