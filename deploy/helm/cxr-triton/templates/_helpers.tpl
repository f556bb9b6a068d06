{{- define "name" -}}
{{ .Values.nameOverride | default .Release.Name | trunc 40 | trimSuffix "-" }}
{{- end }}

{{/* Of selectors, which nobody can change later, and of pods, which an upgrade of the chart alone does not start anew. */}}
{{- define "selector" -}}
app.kubernetes.io/name: cxr-triton
app.kubernetes.io/instance: {{ .root.Release.Name }}
app.kubernetes.io/component: {{ .component }}
{{- end }}

{{- define "labels" -}}
{{ include "selector" . }}
app.kubernetes.io/version: {{ .root.Chart.AppVersion | quote }}
app.kubernetes.io/managed-by: {{ .root.Release.Service }}
helm.sh/chart: {{ printf "%s-%s" .root.Chart.Name .root.Chart.Version }}
{{- end }}

{{- define "podSecurity" -}}
runAsNonRoot: true
runAsUser: 10001
runAsGroup: 10001
fsGroup: 10001
fsGroupChangePolicy: OnRootMismatch
seccompProfile: {type: RuntimeDefault}
{{- end }}

{{- define "containerSecurity" -}}
runAsNonRoot: true
allowPrivilegeEscalation: false
readOnlyRootFilesystem: true
capabilities: {drop: [ALL]}
{{- end }}

{{- define "pullSecrets" -}}
{{- with .Values.imagePullSecrets }}
imagePullSecrets:
  {{- range . }}
  - name: {{ . }}
  {{- end }}
{{- end }}
{{- end }}

{{- define "image" -}}
{{ .image.repository }}{{ if .image.digest }}@{{ .image.digest }}{{ else }}:{{ .image.tag | default .tag }}{{ end }}
{{- end }}

{{/* The recipe's row of recipes.yaml, with what the values say in its place; `capability` is empty where it is not known. */}}
{{- define "recipe" -}}
{{- $rows := .Files.Get "recipes.yaml" | fromYaml -}}
{{- $row := get $rows .Values.recipe | default (dict "tag" "" "capability" "" "memoryGib" 0 "slots" 0) -}}
{{- $slots := .Values.server.slots | default $row.slots | int -}}
{{- dict "tag" (.Values.server.image.tag | default $row.tag) "capability" $row.capability "memoryGib" $row.memoryGib "slots" $slots | toYaml -}}
{{- end }}

{{/* Streams that a server may have before another one is started. */}}
{{- define "streams" -}}
{{- $slots := (include "recipe" . | fromYaml).slots | int -}}
{{ .Values.autoscaling.streams | default (max 1 (div (mul 3 $slots) 4)) }}
{{- end }}

{{- define "rollout" -}}
{{ if .Values.server.spareGpu }}{maxSurge: 1, maxUnavailable: 0}{{ else }}{maxSurge: 0, maxUnavailable: 1}{{ end }}
{{- end }}

{{- define "serverGrace" -}}
{{ add .Values.server.drain.settleSeconds .Values.server.drain.seconds 60 }}
{{- end }}

{{/* Of a Service: LoadBalancers keep the callers' addresses, which limits and peers are counted by. */}}
{{- define "service" -}}
type: {{ .type }}
{{- if ne .type "ClusterIP" }}
externalTrafficPolicy: Local
{{- end }}
{{- with .sourceRanges }}
loadBalancerSourceRanges: {{ toYaml . | nindent 2 }}
{{- end }}
{{- end }}

{{- define "antiAffinity" -}}
{{- $term := dict "topologyKey" "kubernetes.io/hostname" "labelSelector" (dict "matchLabels" (include "selector" . | fromYaml)) -}}
podAntiAffinity:
{{- if eq .how "hard" }}
  requiredDuringSchedulingIgnoredDuringExecution: {{ list $term | toYaml | nindent 4 }}
{{- else }}
  preferredDuringSchedulingIgnoredDuringExecution: {{ list (dict "weight" 100 "podAffinityTerm" $term) | toYaml | nindent 4 }}
{{- end }}
{{- end }}

{{- define "scaling.behavior" -}}
scaleUp:
  stabilizationWindowSeconds: 0
  policies:
    - {type: Pods, value: 2, periodSeconds: 60}
scaleDown:  # one, and the next when it has had the time to end what it reads
  stabilizationWindowSeconds: {{ .Values.autoscaling.steadySeconds }}
  selectPolicy: Min
  policies:
    - {type: Pods, value: 1, periodSeconds: {{ min 1800 (include "serverGrace" . | int) }}}
{{- end }}

{{/* Where spans go, for who sends them. */}}
{{- define "collector.env" -}}
{{- with .Values.tracing.collector }}
- {name: OTEL_EXPORTER_OTLP_ENDPOINT, value: {{ . | quote }}}
{{- end }}
{{- end }}

{{/* An egress rule for the collector's port. */}}
{{- define "collector.egress" -}}
{{- $port := regexFind ":[0-9]+$" (urlParse .Values.tracing.collector).host | trimPrefix ":" | default (ternary "443" "80" (hasPrefix "https:" .Values.tracing.collector)) -}}
- ports: [{protocol: TCP, port: {{ $port }}}]
  {{- with .Values.networkPolicy.collector }}
  to: {{ toYaml . | nindent 4 }}
  {{- end }}
{{- end }}

{{- define "dns" -}}
- ports:
    - {protocol: UDP, port: 53}
    - {protocol: TCP, port: 53}
{{- end }}
